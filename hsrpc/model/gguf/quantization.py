"""What config.json says of weights whose codes are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hsrpc.model.gguf.forms import Float4Experts, Kept
from hsrpc.model.gguf.header import Values

_NUMBER = re.compile(r"\.\d+\.")


def quantization_config(names: Iterable[str], kept: Mapping[str, Kept]) -> Values:
    """The section of tensors `kept`, by their names among all `names`: as compressed-tensors has it, or gpt-oss."""
    weights = [name for name in names if name.endswith(".weight") and "norm" not in name]
    modules = {name.removesuffix(".weight"): kept.get(name) for name in weights}
    forms = list(dict.fromkeys(form for form in kept.values() if not isinstance(form, Float4Experts)))
    if not forms:
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(modules)}
    layouts = {form.layout for form in forms}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": _patterns(modules, form), "weights": form.scheme, "format": form.layout}
            for i, form in enumerate(forms)
        },
        "ignore": _patterns(modules, None),
    }


def _patterns(modules: Mapping[str, Kept | None], form: Kept | None) -> list[str]:
    """What matches the modules of that form and no others: one pattern where all that differ by numbers have it."""
    forms: dict[str, set[Kept | None]] = {}
    for module, own in modules.items():
        forms.setdefault(_pattern(module), set()).add(own)
    chosen = [module for module, own in modules.items() if own == form]
    return list(dict.fromkeys(module if len(forms[_pattern(module)]) > 1 else _pattern(module) for module in chosen))


def _pattern(module: str) -> str:
    """The expression for all modules that differ by the numbers of layers and experts; a name without any is one."""
    parts = [re.escape(part) for part in _NUMBER.split(module)]
    return module if len(parts) == 1 else "re:" + r"\.\d+\.".join(parts) + "$"
