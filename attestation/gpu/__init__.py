"""NVIDIA GPU and NVSwitch evidence: formats, reference values, revocation, appraisal. Pure; at client and enclave."""

from attestation.gpu.appraise import GpuDeviceFacts, GpuEndorsements, GpuFacts, appraise
from attestation.gpu.evidence import GpuDevice, GpuEvidence, decode, encode, from_nvidia_json
from attestation.gpu.ocsp import OcspAnswers
from attestation.gpu.report import Report
from attestation.gpu.rim import Rim, rim_ids

__all__ = [
    "GpuDevice",
    "GpuDeviceFacts",
    "GpuEndorsements",
    "GpuEvidence",
    "GpuFacts",
    "OcspAnswers",
    "Report",
    "Rim",
    "appraise",
    "decode",
    "encode",
    "from_nvidia_json",
    "rim_ids",
]
