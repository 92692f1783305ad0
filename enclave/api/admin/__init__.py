"""Administration under `/v1/organization/`: OpenAI's admin API over `enclave.access.organization`."""

from enclave.api.admin.routes import Admin

__all__ = ["Admin"]
