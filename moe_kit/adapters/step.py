"""`DecodeStep`: linears that share an input, for a token or two without gradients, looked up once and called many times.

At one token the products of a small model cost less than finding out in Python what to multiply. A step remembers the
tensors of a group of linears and checks by identity that they are still the same; anything unusual ends it, and the
general path of `RoutedLayer` takes over.

Shapes: T tokens, D width in, O width out, E experts, L rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_kit.experts.lora import LoRABank
from moe_kit.routing.decision import Routing
from moe_kit.routing.plain import is_untouched

if TYPE_CHECKING:
    from moe_kit.adapters.layer import RoutedLayer


class DecodeStep:
    """Frozen linears with LoRA banks of one adapter, over one input of a few tokens on the CPU.

    Args:
        layers: the linears that are computed together.
        name: the adapter.
        x_BSD: an input as the step will see it, [B, S, D] in the dtype of the linears. That of the banks may be wider.
    """

    def __init__(self, layers: Sequence[RoutedLayer], name: str, x_BSD: Tensor) -> None:
        from moe_kit_kernels.lora_experts import native

        self.name, self.others = name, [layer.path for layer in layers[1:]]
        self.shape, self.dtype = x_BSD.shape, x_BSD.dtype
        self.router = layers[0].owners[name].moe_adapter_router[name]
        bases, banks = [layer.base_layer for layer in layers], [layer.moe_adapter_bank[name] for layer in layers]
        self.scale = banks[0].scale
        self.weights, self.biases = [base.weight for base in bases], [base.bias for base in bases]
        self.A, self.B = [bank.A for bank in banks], [bank.B for bank in banks]
        stores = [bank._parameters or bank._buffers for bank in banks]
        self.parts = [
            (layer._modules, base, base.weight, bank, store, bank.A, bank.B, bank.A.data_ptr(), bank.B.data_ptr())
            for layer, base, bank, store in zip(layers, bases, banks, stores, strict=True)
        ]
        # the C++ adds in float32
        self.banks = None if self.dtype is torch.float64 else native.DecodeBanks.of(self.A, self.B)
        # one view for each expert: to index a stack costs as much as to multiply by it
        self.experts_A = [a.detach().unbind() for a in self.A]
        self.experts_B = [b.detach().unbind() for b in self.B]

    def __deepcopy__(self, memo: dict) -> None:
        # a copied model looks things up anew
        return None

    def __reduce__(self) -> tuple:
        return (type(None), ())

    @staticmethod
    def of(layers: Sequence[RoutedLayer], name: str, x: Tensor, routing: Routing) -> DecodeStep | None:
        """The step for these linears, if they are fit for one.

        Args:
            layers: plain frozen linears that are computed together.
            name: the adapter.
            x: float [..., D], their input.
            routing: a decision for it.

        Returns:
            A step, or None: another kind of bank, banks of several dtypes, an accelerator, or too many tokens.
        """
        from moe_kit_kernels.lora_experts.dispatch import chosen_form

        banks = [layer.moe_adapter_bank[name] for layer in layers]
        if x.device.type != "cpu" or x.dim() != 3 or routing.is_dense:
            return None
        if any(type(bank) is not LoRABank or bank.dropout or bank.scale != banks[0].scale for bank in banks):
            return None
        if len({value.dtype for bank in banks for value in (bank.A, bank.B)}) > 1:
            return None
        # before anything is looked up: a prompt comes this way too
        (experts, _, width_in), ranks = banks[0].A.shape, [bank.A.shape[1] for bank in banks]
        width, tokens = sum(layer.width_out for layer in layers), x.numel() // width_in
        x_TD, pairs = x.reshape(tokens, width_in), routing.weights_TK.numel()
        if chosen_form(x_TD, pairs, experts, max(ranks), width, training=False) != "decode":
            return None
        step = DecodeStep(layers, name, x)
        return step if step.is_current(x) else None

    def is_current(self, x: Tensor) -> bool:
        """Whether the linears and their banks are still what the step was made for, and fit the input.

        Args:
            x: float of the step's `shape`.
        """
        dtype = self.dtype
        if x.dtype is not dtype or x.device.type != "cpu":
            return False
        for modules, base, weight, bank, store, a, b, address_a, address_b in self.parts:
            # dictionaries, not attributes: a module looks its parts up in them after everything else has failed
            if not (
                modules["base_layer"] is base
                and base._parameters["weight"] is weight
                and weight.dtype is dtype
                # the bank's own dictionary; a model that was moved or cast keeps its parameters, not what they hold
                and store["A"] is a
                and store["B"] is b
                and bank.scale == self.scale
                and a.data_ptr() == address_a
                and b.data_ptr() == address_b
                and is_untouched(base)
                and is_untouched(bank)
            ):
                return False
        return not torch.is_autocast_enabled("cpu")

    def __call__(self, x: Tensor, routing: Routing) -> list[Tensor] | None:
        """Compute all linears with their experts.

        Args:
            x: float [B, S, D], for which `is_current` holds.
            routing: the decision for it.

        Returns:
            One float [B, S, O] a linear, or None for a decision that needs the general path.
        """
        from moe_kit_kernels.lora_experts.cpu_decode import base_products, decode_linears

        ids_TK, weights_TK = routing.sparse_ids_NK, routing.sparse_weights_NK
        if ids_TK is None or weights_TK is None or routing.base_weight_N is not None:
            return None
        if routing.decision_T is not None:
            ids_TK, weights_TK = ids_TK[routing.decision_T], weights_TK[routing.decision_T]
        batch, length, width = self.shape
        x_TD = x.reshape(-1, width).contiguous()
        if self.banks is not None and self.banks.take(ids_TK, weights_TK):
            results = base_products(x_TD, self.weights, self.biases)
            # a conversion that copies nothing is still a call of a few hundred nanoseconds for each linear
            if self.dtype is not torch.float32:
                results, x_TD = [result.float() for result in results], x_TD.float()
            self.banks.add(results, x_TD, ids_TK, weights_TK, self.scale)
            if self.dtype is not torch.float32:
                results = [result.to(self.dtype) for result in results]
            return [result.view(batch, length, -1) for result in results]
        results = decode_linears(
            x_TD,
            self.weights,
            self.biases,
            self.experts_A,
            self.experts_B,
            ids_TK.tolist(),
            weights_TK.tolist(),
            self.scale,
        )
        return [result.view(batch, length, -1) for result in results]
