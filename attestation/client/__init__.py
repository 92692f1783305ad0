"""The relying party: verifies an enclave inside the TLS handshake, then talks to it. Runs on the user's machine.

Trusts Intel's and NVIDIA's roots and its own policy; neither the network, nor the relay, nor the machine's owner.
Modules are imported one by one (`attestation.client.openai`, `attestation.client.tls`, …), so that an offline command
loads no HTTP library.
"""
