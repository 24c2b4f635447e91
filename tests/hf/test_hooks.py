"""The hooks on their own: contexts open and close as they should, whatever a forward pass does."""

import pytest
import torch
from torch import nn

from moe_kit import RoutingError, routing_inputs, routing_losses
from moe_kit.hf.batch import packed_sequences, predicts_next_token, real_tokens, shifts_labels
from moe_kit.hf.checks import check_rows
from moe_kit.hf.hooks import _HOOKS, attach, detach, loss_share
from moe_kit.routing.state import ATTRIBUTE, require_routing_state
from tests.conformance.common import routed
from tests.tiny import batch_of, tiny_llama


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def context(model):
    return require_routing_state(model).context


class TestAttach:
    def test_twice_and_off(self):
        model = tiny_llama()
        state = attach(model)
        count = hooks_of(model)
        assert attach(model) is state
        assert hooks_of(model) == count > 0
        detach(model)
        assert hooks_of(model) == 0
        assert not [m for m in model.modules() if ATTRIBUTE in m.__dict__ or _HOOKS in m.__dict__]
        detach(model)

    def test_the_configuration_is_left_as_it_was(self):
        model = routed(losses={"switch": 0.1})
        config = model.get_base_model().config
        assert config.output_router_logits is False
        bare = model.unload()
        assert not hasattr(bare.config, "output_router_logits")
        assert not hasattr(bare.config, "router_aux_loss_coef")

    def test_any_module_will_do(self):
        """A model without a configuration, called with positions only."""
        from peft import get_peft_model

        from moe_kit import RoutedAdapterConfig

        base = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        config = RoutedAdapterConfig.from_preset("mixture_of_lora", num_experts=3, r=2, target_modules=["0", "2"])
        model = get_peft_model(base, config)
        assert model(torch.randn(4, 6)).shape == (4, 2)
        assert model(torch.randn(4, 5, 6)).shape == (4, 5, 2)
        assert not context(model).is_open


class TestPasses:
    def test_a_failing_pass_closes(self):
        model = routed()
        handle = model.get_base_model().model.layers[1].register_forward_pre_hook(boom)
        with pytest.raises(RuntimeError, match="boom"):
            model(**batch_of())
        handle.remove()
        assert not context(model).is_open
        model(**batch_of())
        assert len(context(model).registered) == 4

    def test_positional_arguments(self):
        model = routed()
        batch = batch_of()
        batch["attention_mask"][0, :2] = 0
        model.get_base_model()(batch["input_ids"], batch["attention_mask"])
        assert torch.equal(context(model).mask_BS, batch["attention_mask"].bool())

    def test_tuples_instead_of_outputs(self):
        model = routed(losses={"switch": 1.0}).train()
        whole = model(**batch_of()).loss
        first = model(**batch_of(), return_dict=False)[0]
        torch.testing.assert_close(first, whole)
        model.eval()
        plain = model(**batch_of(), return_dict=False)[0]
        torch.testing.assert_close(whole - plain, 1.0 * expected_switch(model))

    def test_losses_only_in_training(self):
        model = routed(losses={"switch": 1.0})
        model(**batch_of())
        assert routing_losses(model) == {}
        model.train()(**batch_of())
        assert set(routing_losses(model)) == {"switch"}
        with torch.no_grad():
            with_loss = model(**batch_of()).loss
            assert with_loss == model.eval()(**batch_of()).loss, "a pass without a graph is no training pass"

    def test_a_context_lives_until_the_next_pass(self):
        model = routed()
        model(**batch_of())
        first = context(model)
        assert not first.is_open
        assert len(first.registered) == 4
        model(**batch_of())
        assert context(model) is not first

    def test_inputs_reach_a_context_and_leave_it(self):
        model = routed()
        prior = torch.randn(2, 4)
        with routing_inputs(model, prior=prior, mask_ratio=0.25):
            model(**batch_of())
            assert context(model).prior_BE is prior
            assert context(model).scalars == {"mask_ratio": 0.25}
        model(**batch_of())
        assert context(model).prior_BE is None
        with pytest.raises(RoutingError, match="no moe_kit routers"), routing_inputs(tiny_llama()):
            pass


def boom(*_):
    raise RuntimeError("boom")


def expected_switch(model):
    model.train()(**batch_of())
    return routing_losses(model)["switch"]


class TestMasks:
    def test_last_columns_under_a_cache(self):
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
        assert real_tokens(mask, torch.Size([2, 2])).tolist() == [[True, True], [True, False]]
        assert real_tokens(mask[:, None, None], torch.Size([2, 4])) is None
        assert real_tokens({"full": mask}, torch.Size([2, 4])) is None
        assert real_tokens(mask, torch.Size([2, 6])) is None
        assert real_tokens(None, torch.Size([2, 4])) is None

    @pytest.mark.parametrize(
        ("positions", "expected", "count"),
        [
            ([[0, 1, 2, 0, 1]], [[0, 0, 0, 1, 1]], 2),
            ([[0, 1, 0, 1], [0, 0, 1, 2]], [[0, 0, 1, 1], [2, 3, 3, 3]], 4),
            ([[3, 4, 5, 6]], None, None),
            ([[0, 1, 2], [0, 1, 2]], None, None),
        ],
    )
    def test_documents(self, positions, expected, count):
        positions = torch.tensor(positions)
        found, number, gaps = packed_sequences({"position_ids": positions}, positions.shape)
        assert gaps is None
        assert number == count
        assert found is None if expected is None else found.tolist() == expected

    def test_prompts(self):
        model = routed(scope="sequence")
        batch = batch_of(rows=2)
        batch["labels"][0, :2] = -100
        model(**batch)
        # the second row has labels from its first token on: it reads all
        assert context(model).prompt_mask_BS.tolist() == [[True] * 2 + [False] * 4, [True] * 6]
        del batch["labels"]
        batch["attention_mask"][1, :3] = 0
        with routing_inputs(model, prompt_length=2):
            model(**batch)
        assert context(model).prompt_mask_BS.tolist() == [
            [True] * 2 + [False] * 4,
            [False] * 3 + [True] * 2 + [False],
        ]
        with routing_inputs(model, prompt_mask=torch.ones(2, 6)):
            model(**batch)
        assert torch.equal(context(model).prompt_mask_BS, batch["attention_mask"].bool())

    def test_a_row_without_a_real_token_is_refused(self):
        for scope in ("token", "sequence"):
            model = routed(scope=scope)
            for learning in (True, False):
                batch = batch_of(rows=3)
                batch["attention_mask"][1] = 0
                with pytest.raises(RoutingError, match=r"rows \[1\] of the attention mask \[3, 6\] hold no real token"):
                    model.train(learning)(**batch)
            if scope == "sequence":
                with pytest.raises(RoutingError, match=r"rows \[1\]"):
                    model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
            # the refused batch leaves nothing behind
            batch["attention_mask"][1, -1] = 1
            assert model(**batch).logits.isfinite().all()

    def test_a_chunk_of_padding_is_no_row_of_padding(self):
        """Left padding may fill a whole chunk of a prompt that is read in pieces."""
        model = routed().eval()
        batch = batch_of(rows=2)
        del batch["labels"]
        batch["attention_mask"][1, :4] = 0
        greedy = dict(max_new_tokens=3, do_sample=False)
        whole = model.generate(**batch, **greedy)
        assert torch.equal(model.generate(**batch, **greedy, prefill_chunk_size=3), whole)

    def test_where_nothing_is_checked_such_a_row_changes_no_other(self, monkeypatch):
        """On an accelerator, which would have to be waited for: nothing of it is NaN."""
        monkeypatch.setattr("moe_kit.hf.hooks.check_rows", lambda mask: None)
        for scope in ("token", "sequence"):
            model = routed(scope=scope).train()
            batch = batch_of(rows=2)
            batch["attention_mask"][1] = 0
            batch["labels"][1] = -100
            out = model(**batch)
            out.loss.backward()
            assert out.loss.isfinite()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
            alone = model(**{key: value[:1] for key, value in batch.items()})
            torch.testing.assert_close(out.logits[:1], alone.logits)

    def test_only_the_cpu_is_asked(self):
        check_rows(torch.zeros(2, 3, device="meta"))
        check_rows(torch.zeros(2, 1, 3, 3))
        check_rows(None)
        with pytest.raises(RoutingError, match=r"rows \[0, 1, 2, 3, 4, 5, 6, 7\] and 2 more"):
            check_rows(torch.zeros(10, 3, dtype=torch.long))

    @pytest.mark.parametrize("shape", [(2, 5), (3, 6), (6,), (2, 6, 1), (2, 7)])
    def test_a_prompt_mask_of_another_shape_is_refused(self, shape):
        model = routed(scope="sequence")
        with routing_inputs(model, prompt_mask=torch.ones(shape)), pytest.raises(RoutingError, match="prompt_mask has"):
            model(**batch_of(rows=2))
        with routing_inputs(model, prompt_length=[1, 2, 3]), pytest.raises(RoutingError, match="prompt_length has 3"):
            model(**batch_of(rows=2))

    def test_a_prompt_mask_serves_generation(self):
        """It is read with the prompt, repeated for beams, and not missed while decoding."""
        model = routed(scope="sequence").eval()
        batch = batch_of(rows=2)
        del batch["labels"]
        prompt = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
        states = []
        handle = model.get_base_model().register_forward_hook(
            lambda *_: states.append(context(model).prompt_mask_BS), prepend=True
        )
        with routing_inputs(model, prompt_mask=prompt):
            model.generate(**batch, max_new_tokens=3, do_sample=False, num_beams=2)
        handle.remove()
        assert torch.equal(states[0], prompt.bool().repeat_interleave(2, 0))


class Interrupted(nn.Module):
    """Stands in for a layer's part and is interrupted from the keyboard."""

    def forward(self, *args, **kwargs):
        raise KeyboardInterrupt


class TestInterruption:
    """torch runs no closing hook after a KeyboardInterrupt, so the pass before looks open to the next one."""

    def test_the_next_pass_of_the_whole_model(self):
        model = routed(scope="sequence").eval()
        batch = batch_of(rows=2)
        expected = model(**batch).logits
        layer = model.get_base_model().model.layers[1]
        mlp, layer.mlp = layer.mlp, Interrupted()
        with pytest.raises(KeyboardInterrupt):
            model(**batch_of(rows=3))
        layer.mlp = mlp
        assert torch.equal(model(**batch).logits, expected)
        assert not context(model).is_open

    def test_the_next_pass_of_a_part_alone(self):
        """T5 runs its encoder on its own first when it generates."""
        from tests.conformance.test_families import t5

        model = routed(t5(), target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
        batch = {
            "input_ids": batch_of(rows=2)["input_ids"],
            "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]),
        }
        greedy = dict(max_new_tokens=3, do_sample=False)
        expected = model.generate(**batch, **greedy)
        block = model.get_base_model().decoder.block[-1].layer[-1]
        original, block.forward = block.forward, Interrupted().forward
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=batch_of(rows=3)["input_ids"], labels=batch_of(rows=3)["labels"])
        assert context(model).is_open, "if torch closes it one day, nothing needs to be told apart"
        block.forward = original
        model.get_base_model().encoder(**batch)
        assert not context(model).is_open
        assert torch.equal(context(model).mask_BS, batch["attention_mask"].bool())
        assert torch.equal(model.generate(**batch, **greedy), expected)

    def test_a_part_inside_a_living_pass_opens_nothing(self):
        model = routed().eval()
        state = require_routing_state(model)
        model(**batch_of(rows=2))
        assert [call.path for call in state.current.calls] == ["", "model"]
        assert {id(call.context) for call in state.current.calls} == {id(state.context)}

    def test_the_pass_after_an_interrupted_part_counts_once(self):
        model = routed(preset="loss_free").train()
        inner = model.get_base_model()
        handle = inner.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            inner.model(input_ids=batch_of()["input_ids"])
        handle.remove()
        model(**batch_of())
        assert len(context(model).registered) == 4
        router = next(m for m in model.modules() if getattr(m, "counter", None) is not None)
        assert router.counter.sum() == 2 * 6 * 2


def interrupt(*_):
    raise KeyboardInterrupt


class TestShare:
    def test_by_labels(self):
        model = tiny_llama()
        labels = torch.tensor([[1, -100, 3, 4], [1, -100, -100, -100]])
        share = loss_share(model, {"labels": labels, "num_items_in_batch": 10})
        assert share == pytest.approx(0.2), "the first column predicts nothing"
        assert loss_share(model, {"labels": labels}) == 1.0
        assert loss_share(model, {"num_items_in_batch": 10}) == 1.0
        shifted = {"labels": labels, "shift_labels": labels, "num_items_in_batch": 10}
        assert loss_share(model, shifted) == pytest.approx(0.4)

    def test_which_models_shift(self):
        from tests.conformance.test_families import bert, gpt2, t5

        assert shifts_labels(tiny_llama())
        # the Trainer counts GPT-2's labels from the first on, so our share of its count does
        assert not shifts_labels(gpt2())
        assert predicts_next_token(gpt2())
        assert predicts_next_token(tiny_llama())
        assert not predicts_next_token(t5())
        assert not predicts_next_token(bert())
        assert not shifts_labels(t5())
        assert not shifts_labels(bert())
        assert not shifts_labels(nn.Linear(2, 2))
