"""The CPU forms of LoRA experts by name."""

from moe_kit_kernels.lora_experts import cpu_columns, cpu_pairs, native
from moe_kit_kernels.lora_experts.call import Form

FORMS: dict[str, Form] = {"dense": cpu_columns, "sorted": cpu_pairs, "native": native}
"""`dense`: all experts as columns of two GEMMs. `sorted`: the chosen pairs by grouped_mm. `native`: the chosen pairs in C++."""
