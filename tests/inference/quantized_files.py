"""Models as quantizers write them: rounded to 4 bits, in the layouts of GPTQ, AWQ and compressed-tensors."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from agentlab import files

METHODS = ("gptq", "awq", "compressed-tensors")
_GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_CONFIGS = {
    "gptq": {"bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True},
    "awq": {"bits": 4, "group_size": _GROUP, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": _GROUP,
                },
            }
        },
    },
}  # fmt: skip


def write_quantized(folder, target, method):
    """The model of `folder` at 4 bits in `target`; the folder of the same model, its weights restored to fp32."""
    restored = target.with_name(f"{target.name}-restored")
    for place in (target, restored):
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    packed, plain = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight.to(torch.bfloat16).contiguous()
            plain[name] = packed[name].float()
            continue
        values, scales, plain[name] = _rounded(weight)
        module = name.removesuffix(".weight")
        zeros = torch.full((weight.shape[1] // _GROUP, weight.shape[0]), 8, dtype=torch.int32)
        if method == "gptq":
            packed |= {
                f"{module}.qweight": _words(values.T, 0),
                f"{module}.qzeros": _words(zeros - 1, 1),  # its files hold one less
                f"{module}.scales": scales.T.contiguous(),
                f"{module}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // _GROUP,
            }
        elif method == "awq":
            packed |= {
                f"{module}.qweight": _words(values.T, 1, _AWQ_ORDER),
                f"{module}.qzeros": _words(zeros, 1, _AWQ_ORDER),
                f"{module}.scales": scales.T.contiguous(),
            }
        else:
            packed |= {
                f"{module}.weight_packed": _words(values, 1),
                f"{module}.weight_scale": scales,
                f"{module}.weight_shape": torch.tensor(weight.shape),
            }
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, restored / "model.safetensors", metadata={"format": "pt"})
    config = files.read_json(target / "config.json")
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {"quant_method": method, **_CONFIGS[method]}
    files.write_json(target / "config.json", config)
    return restored


def _rounded(weight):
    """(values 0 to 15 about 8, scales, weights restored from both) of a weight (out, in), in groups of the input."""
    out, width = weight.shape
    groups = weight.float().reshape(out, width // _GROUP, _GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-4).to(torch.bfloat16)
    values = (groups / scales.float()).round().clamp(-8, 7)
    restored = (values * scales.float()).reshape(out, width)
    return (values + 8).reshape(out, width).to(torch.int32), scales.squeeze(-1), restored


def _words(values, dim, order=tuple(range(8))):
    """Eight 4-bit values along `dim` in one int32, the first of `order` in the lowest bits."""
    values = values.movedim(dim, -1)
    values = values.reshape(*values.shape[:-1], -1, 8).to(torch.int64)
    words = sum(values[..., at] << (4 * place) for place, at in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()
