"""Who may ask what of which model, how much of it, and what it costs. Put together by `enclave.tenancy`."""
