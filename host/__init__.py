"""What the machine's owner runs: programs that move ciphertext and public statements, and gain nothing but
throughput.

Nobody asks this zone to be honest. The relay (`host.relay`) sees sealed bytes and uses the standard library
alone; it imports nothing that could open them, so this package file imports nothing either.
"""

__all__: list[str] = []
