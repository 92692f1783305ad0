"""The TDX guest: the only zone that holds plaintext and private keys."""
