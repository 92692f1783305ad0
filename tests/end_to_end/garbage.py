"""`python -m tests.end_to_end.garbage FILE…`: a TLS server per PEM file (certificate and key), for a crowd of clients.

In a process of its own, so that the client's process holds what the client costs and nothing else. Prints the ports in
the order of the files; at the end of its input it prints how many connections and application bytes it has seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import ssl
import sys


def raise_limit() -> int:
    """As many descriptors as this user may have; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(hard, 8192)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


async def serve(files: list[str]) -> None:
    seen = {"handshakes": 0, "bytes": 0}

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen["handshakes"] += 1
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                seen["bytes"] += len(data)
        writer.close()

    ports = []
    for file in files:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(file)
        server = await asyncio.start_server(
            count, "127.0.0.1", 0, ssl=context, backlog=2048, ssl_handshake_timeout=200, ssl_shutdown_timeout=1
        )
        ports.append(server.sockets[0].getsockname()[1])
    print(json.dumps(ports), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.sleep(0.5)  # bytes that were on the way
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    raise_limit()
    asyncio.run(serve(sys.argv[1:]))
