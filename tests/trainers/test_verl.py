"""docs/guides/trainers/verl.md, with verl's own forward: `make test-trainers` installs it."""

import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ..helpers.snippets import DOCS, blocks

torch_functional = pytest.importorskip(
    "verl.utils.experimental.torch_functional", reason="make test-trainers installs verl"
)
THEIRS = torch_functional.FusedLinearForPPO
IDS = torch.arange(30).mul(37).remainder(101).view(1, 30)


@pytest.fixture
def model(monkeypatch):
    """A small model with the forward that verl gives it."""
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    class Qwen2(Qwen2ForCausalLM):  # verl replaces the forward of the class
        pass

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Qwen2(Qwen2Config(vocab_size=101, num_key_value_heads=1, initializer_range=0.3, **sizes))
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", THEIRS)
    return model


@pytest.fixture
def use_the_page(tmp_path, monkeypatch):
    """Imports the page's module by verl's own code, as `external_lib` does."""
    from verl.utils.import_utils import import_external_libs

    (block,) = blocks(DOCS / "guides/trainers/verl.md")
    (tmp_path / "my_fused.py").write_text(block.code)
    monkeypatch.syspath_prepend(tmp_path)

    def use():
        import_external_libs("my_fused")
        del sys.modules["my_fused"]

    return use


def step(model, temperature):
    model.zero_grad()
    output = model(IDS, temperature=temperature, return_dict=True)
    weights = torch.linspace(-1, 2, IDS.numel()).view_as(IDS)
    (output.log_probs * weights + 0.3 * output.entropy).sum().backward()
    return output.log_probs.detach(), output.entropy.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies(model, use_the_page, temperature):
    expected = step(model, temperature)
    use_the_page()
    assert torch_functional.FusedLinearForPPO is not THEIRS
    torch.testing.assert_close(step(model, temperature), expected, rtol=1e-4, atol=1e-4)


def test_logits_of_bfloat16_are_not_rounded(model, use_the_page):
    model.bfloat16()
    hidden = model.model(IDS).last_hidden_state.double()
    target = IDS.roll(-1, -1)
    truth = (hidden @ model.lm_head.weight.double().T).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    theirs = model(IDS, return_dict=True).log_probs
    use_the_page()
    ours = model(IDS, return_dict=True).log_probs
    assert (ours - truth).abs().max() < 1e-5
    assert (theirs - truth).abs().max() > 1e-3
