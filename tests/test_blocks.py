"""What of a model's activations is kept for backward, and blocks that are compiled: the same gradients either way."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from conftest import TINY_LLAMA
from dft_lightning import CausalLMModule, DFTLoss
from dft_lightning.errors import InputError
from dft_lightning.models import blocks
from dft_lightning.models.attention import ends_graphs
from dft_lightning.models.blocks import Checkpointing
from dft_lightning.models.loading import load_causal_lm
from dft_lightning.modules import GenerationOptions
from family_configs import tiny_config
from small_runs import TINY_GPT2, GradientRecorder, arithmetic_data, graphs_of, trainer
from test_normalization import relative

CHOICES = get_args(Checkpointing)
DROPPING = {**TINY_GPT2, "vocab_size": 20, "n_layer": 4, "attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.1}
LORA = {"r": 2, "target_modules": ["c_attn"]}


def gradients(model=DROPPING, precision="32-true", steps=2, rows=None, peft=None, **loading):
    """Of the first steps of a fit, in float64 unless told otherwise."""
    pl.seed_everything(0)
    module = GradientRecorder(model, loss=DFTLoss(), loading={"dtype": "float64", **loading}, peft=peft)
    run = trainer(max_steps=steps, max_epochs=-1, accumulate_grad_batches=2, precision=precision)
    run.fit(module, datamodule=arithmetic_data(**{"num_rows": 16, "batch_size": 4, "shuffle": False, **(rows or {})}))
    return torch.stack(module.gradients)


# -- activations -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    return gradients(), gradients(head="full")


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_are_those_of_all_activations_kept(choice, plain):
    """With dropout everywhere, whose draws are the same again."""
    assert relative(gradients(gradient_checkpointing=choice), plain[0]) < 1e-12
    assert relative(gradients(gradient_checkpointing=choice, head="full"), plain[1]) < 1e-12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder for an adapter."""
    pytest.importorskip("peft", reason="the peft extra is not installed")
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    load_causal_lm(DROPPING).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("choice", CHOICES)
def test_adapters(choice, base):
    """Whose base is frozen, so that the first block's input needs no gradient."""
    assert relative(gradients(base, peft=LORA, gradient_checkpointing=choice), gradients(base, peft=LORA)) < 1e-12


def test_autocast_of_a_loop_of_ones_own():
    """Other than Lightning's it has a cache, which holds what the checks of the first batch have cast."""
    found = []
    for choice in (False, "selective"):
        torch.manual_seed(0)
        module = CausalLMModule(TINY_LLAMA, loading={"gradient_checkpointing": choice})
        module.configure_model()
        ids = torch.arange(12).view(2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.token_output({"input_ids": ids, "labels": ids}).loss
        loss.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    assert torch.equal(*found)


class Operations(TorchDispatchMode):
    """Counts operators as they are computed."""

    def __enter__(self):
        self.found = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.found[operation.name().partition(".")[0].removeprefix("aten::")] += 1
        return operation(*args, **(kwargs or {}))


def operations(choice):
    """Of one forward and backward pass of four blocks of Llama."""
    module = CausalLMModule(TINY_LLAMA | {"num_hidden_layers": 4}, loading={"gradient_checkpointing": choice})
    module.configure_model()
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    model = module.model.model
    model(**batch)
    with Operations() as counted:
        model(**batch).last_hidden_state.sum().backward()
    return counted.found


def test_what_is_computed_again():
    """An activation stands for what is cheap. A block has one, seven products, and attention by one operator."""
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    kept = operations(False)
    assert (kept["silu"], kept[attention]) == (4, 4)
    for choice, again, products in (
        ("full", 4, 4 * 7),
        ("every_2", 2, 2 * 7),
        ("every_3", 2, 2 * 7),
        ("every_4", 1, 7),
        ("selective", 4, 0),
        ("offload", 0, 0),
    ):
        found = operations(choice)
        assert found["silu"] == 4 + again, choice
        # The last product of a block is no longer needed when it is computed again.
        assert found["mm"] - kept["mm"] in (products, products - again if products else 0), choice
        assert found[attention] == 4 + (again if products else 0), choice


def test_operations_that_draw_are_computed_again():
    """Kept, they would leave the generator behind, and what draws after them would draw other numbers."""
    tensor, kept = torch.zeros(1, 1, 2, 2), blocks._Selection("Own")
    output = SelectiveCheckpointContext(is_recompute=False, op_output=(torch.ones(2), 0))
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    for dropout, policy in ((0.0, CheckpointPolicy.MUST_SAVE), (0.1, CheckpointPolicy.PREFER_RECOMPUTE)):
        assert kept(output, attention, tensor, tensor, tensor, dropout) == policy
        assert kept(output, attention, tensor, tensor, tensor, dropout_p=dropout) == policy
    assert kept(output, torch.ops.aten.addmm.default, tensor, tensor, tensor) == CheckpointPolicy.MUST_SAVE
    assert kept(output, torch.ops.aten.silu.default, tensor) == CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma3n_text"])
def test_products_that_are_changed_in_place_are_no_selection(model_type):
    """Torch notices the one, and makes a wrong gradient of the other."""
    module = CausalLMModule(tiny_config(model_type), loading={"gradient_checkpointing": "selective"})
    module.configure_model()
    ids = torch.arange(12).view(2, 6)
    with pytest.raises(InputError, match=r"gradient_checkpointing: \w+ changes matrix products in place: set full$"):
        module.token_output({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_is_offloaded(monkeypatch, precision):
    """As if the CPU's tensors were on a device: activations come back as they were, and weights stay where they are."""
    options = {"precision": precision, "dtype": "float32", "steps": 1}
    kept, moved = gradients(**options), []
    monkeypatch.setattr(blocks, "_stays", blocks.is_of_a_parameter)
    to_host = blocks._to_host
    monkeypatch.setattr(blocks, "_to_host", lambda tensor: moved.append((tensor, to_host(tensor))) or moved[-1][1])
    assert torch.equal(gradients(gradient_checkpointing="offload", **options), kept)
    stayed = [tensor for tensor, packed in moved if isinstance(packed, torch.Tensor)]
    copies = [(tensor, packed[1]) for tensor, packed in moved if not isinstance(packed, torch.Tensor)]
    assert all(copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() for tensor, copy in copies)
    # Each of the four products of a block has a weight for its backward pass, in each of two micro-batches.
    assert sum(tensor.ndim == 2 and set(tensor.shape) <= {16, 48, 64} for tensor in stayed) == 2 * 4 * 4
    assert not any(tensor.ndim == 2 and set(tensor.shape) <= {16, 48, 64} for tensor, _ in copies)
    assert len(copies) > 2 * 4 * 10


def test_a_model_whose_blocks_are_not_asked(monkeypatch):
    """Of code of one's own that computes all again or nothing."""

    class Own(CausalLMModule):
        def build_model(self):
            model = nn.Linear(2, 2)
            model.gradient_checkpointing_enable = lambda gradient_checkpointing_kwargs: None
            return model

    with pytest.raises(InputError, match=r"the blocks of Linear are computed again all or none: set full"):
        Own("own", loading={"gradient_checkpointing": "every_2"}).configure_model()
    Own("own", loading={"gradient_checkpointing": "full"}).configure_model()


@pytest.mark.parametrize("value", ["ful", "every_1", "every_5", 2, 0, None])
def test_unknown_choices_are_refused_with_those_that_there_are(value):
    with pytest.raises(ValueError, match=r"gradient_checkpointing.*(full, selective, every_2|expected bool)"):
        CausalLMModule(TINY_LLAMA, loading={"gradient_checkpointing": value})


def test_true_is_full():
    assert CausalLMModule(TINY_LLAMA, loading={"gradient_checkpointing": True}).loading.gradient_checkpointing == "full"


# -- compiled ----------------------------------------------------------------------------------------------------------

RAGGED = {
    "padded": {},
    "padding-free": {"padding_free": True},
    "packed": {"packing": "bfd", "max_length": 64},
    "packed, padding-free": {"packing": "bfd", "max_length": 64, "padding_free": True},
}
STEPS = 24


@pytest.mark.parametrize(
    ("rows", "choice", "attention"),
    [
        ("padded", False, "sdpa"),
        ("padding-free", "full", "sdpa"),
        ("padding-free", False, "documents"),
        ("packed", "selective", "sdpa"),
        ("packed, padding-free", "selective", "documents"),
    ],
)
def test_three_graphs_at_most_for_all_lengths(rows, choice, attention):
    given = {"num_rows": 4 * STEPS, **RAGGED[rows]}
    options = {"model": {**TINY_GPT2, "vocab_size": 20}, "rows": given, "steps": STEPS // 2}
    options |= {"gradient_checkpointing": choice, "attn_implementation": attention}
    expected = gradients(**options)
    with graphs_of() as made:
        found = gradients(compile=True, **options)
    assert 1 <= len(made) <= 3
    assert len(found) == STEPS // 2
    assert relative(found, expected) < 1e-12


def test_an_attention_that_would_cut_graphs_is_refused():
    """Of documents with dropout, which go one by one."""
    options = {"attn_implementation": "documents", "rows": {"padding_free": True}, "compile": True}
    with pytest.raises(InputError, match=r"^model.loading.compile: .*the documents attention .*sdpa, or leave compile"):
        gradients(**options)
    dropping, other, cuda = load_causal_lm(DROPPING), load_causal_lm(TINY_LLAMA), torch.device("cuda", 0)
    assert ends_graphs(other, cuda, "32-true")
    assert not ends_graphs(other, cuda, "bf16-mixed")
    assert ends_graphs(dropping, cuda, "bf16-mixed")
    assert not ends_graphs(other, torch.device("cpu"), "32-true")
    assert ends_graphs(load_causal_lm({**TINY_LLAMA, "attention_dropout": 0.1}), cuda, "bf16-mixed")


def test_an_adapter_and_dropout_and_generation_add_no_graph(base):
    options = {"peft": LORA, "gradient_checkpointing": "selective"}
    expected = gradients(base, **options)
    with graphs_of("aot_eager") as made:
        assert relative(gradients(base, compile=True, **options), expected) < 1e-12
        trained = len(made)
        module = CausalLMModule(base, loading={"compile": True})
        module.configure_model()
        prompts = torch.arange(3, 15).view(2, 6)
        tokens = module.generate_tokens(prompts, torch.ones_like(prompts), GenerationOptions(max_new_tokens=4))
    assert 1 <= trained <= 3
    assert len(made) == trained
    assert tokens.shape[0] == 2


def test_names_in_checkpoints_stay():
    names = []
    for compiled in (False, True):
        module = CausalLMModule(TINY_LLAMA, loading={"compile": compiled})
        module.configure_model()
        names.append([*module.state_dict()])
    assert names[0] == names[1]
    assert not torch._dynamo.config.optimize_ddp  # which would cut the graph of a large block


def test_a_model_without_repeated_layers():
    class Own(CausalLMModule):
        def build_model(self):
            return nn.Linear(2, 2)

    with pytest.raises(InputError, match=r"^model.loading.compile: Linear has no ModuleList of repeated layers: set f"):
        Own("own", loading={"compile": True}).configure_model()


@pytest.mark.parametrize("call", ["fit", "validate"])
def test_a_module_that_is_compiled_whole_is_refused(call):
    module, data = CausalLMModule(TINY_LLAMA), arithmetic_data(4)
    data.sources["validation"] = data.sources["train"]
    with pytest.raises(InputError, match=r"^torch.compile\(CausalLMModule\): .*model.loading.compile: true"):
        getattr(trainer(), call)(torch.compile(module), datamodule=data)
    getattr(trainer(), call)(module, datamodule=data)  # as it was
