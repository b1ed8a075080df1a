"""Peak rates of matrix products of known accelerators, from their vendors' data sheets (dense, without sparsity)."""

import jax

# Part of ``device_kind`` -> TFLOP/s with bfloat16 operands, and with float32 operands in full precision where the
# hardware has such products (TPUs emulate them).
_PEAKS: dict[str, tuple[float, float | None]] = {
    "V100": (125.0, 15.7),  # float16
    "A100": (312.0, 19.5),
    "A10": (125.0, 31.2),
    "L40": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "B200": (2250.0, 75.0),
    "TPU v3": (123.0, None),
    "TPU v4": (275.0, None),
    "TPU v5 lite": (197.0, None),
    "TPU v5p": (459.0, None),
    "TPU v5": (459.0, None),
    "TPU v6 lite": (918.0, None),
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Return the peak FLOP/s of a device for products with operands of a dtype; None where it is not known."""
    return peak_of_kind(device.device_kind, dtype)


def peak_of_kind(kind: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a kind of device, such as "NVIDIA A100-SXM4-80GB" or "a100-80"; see ``peak_flops``."""
    matches = [name for name in _PEAKS if name.lower() in kind.lower()]
    if not matches:
        return None
    bfloat16, float32 = _PEAKS[max(matches, key=len)]
    rate = bfloat16 if dtype == "bfloat16" else float32
    return None if rate is None else rate * 1e12
