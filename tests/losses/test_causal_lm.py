"""`fused_causal_lm_loss` equals transformers' ForCausalLMLoss; the README's three ways to ignore tokens are right."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from fused_ignore_ce import FusedCrossEntropyLoss, fused_causal_lm_loss, fused_cross_entropy
from fused_ignore_ce.backends import choice as backends

V, SPECIAL, PAD = 61, 7, 0


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
                   attn_pdrop=0)
    )  # fmt: skip


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=32)
    )  # fmt: skip


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def models(request, device):
    """The same model twice: (plain, to be fused)."""
    plain, fused = request.param(), request.param()
    fused.load_state_dict(plain.state_dict())
    return plain.to(device), fused.to(device)


@pytest.fixture
def batch(device):
    ids = torch.randint(8, V, (3, 16), device=device)
    ids[:, 5] = SPECIAL
    ids[1, 10:] = PAD
    labels = ids.clone()
    labels[:, :6] = -100  # the prompt
    labels[1, 10:] = -100  # padding
    return ids, labels


def assert_same_training(plain, fused, plain_loss, fused_loss):
    torch.testing.assert_close(fused_loss, plain_loss)
    (plain_loss * 3).backward()
    (fused_loss * 3).backward()
    for (name, expected), (_, ours) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, msg=lambda m, name=name: f"{name}: {m}")
        assert expected.grad.abs().sum() > 0


@pytest.mark.parametrize("ids", [SPECIAL, (SPECIAL, PAD)], ids=["one", "several"])
def test_a_criterion_that_ignores_special_tokens(ids, models, batch, backend):
    plain, fused = models
    input_ids, _ = batch
    target = input_ids[:, 1:].reshape(-1)

    def logits(model):
        return model(input_ids).logits[:, :-1].flatten(0, 1)

    masked = target
    for special in [ids] if isinstance(ids, int) else ids:
        masked = masked.masked_fill(target == special, -100)
    criterion = FusedCrossEntropyLoss(ignore_index=ids, backend=backend)
    plain_loss = torch.nn.CrossEntropyLoss()(logits(plain), masked)
    assert_same_training(plain, fused, plain_loss, criterion(logits(fused), target))


def test_b_labels_of_minus_100_through_loss_function(models, batch):
    plain, fused = models
    input_ids, labels = batch
    fused.loss_function = fused_causal_lm_loss
    assert_same_training(plain, fused, plain(input_ids, labels=labels).loss, fused(input_ids, labels=labels).loss)


@pytest.mark.parametrize("count", [11, torch.tensor(11), torch.tensor([11])], ids=["int", "0-d", "1-d"])
def test_b_with_num_items_in_batch(count, models, batch):
    plain, fused = models
    input_ids, labels = batch
    fused.loss_function = fused_causal_lm_loss
    plain_loss = plain(input_ids, labels=labels, num_items_in_batch=count).loss.reshape(())
    fused_loss = fused(input_ids, labels=labels, num_items_in_batch=count).loss
    assert_same_training(plain, fused, plain_loss, fused_loss)


def test_c_a_subclass_that_overrides_forward(batch, device):
    class FusedLlama(LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            outputs = super().forward(input_ids, **kwargs)
            if labels is not None:
                outputs.loss = fused_cross_entropy(
                    outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=(-100, SPECIAL)
                )
            return outputs

    plain = llama().to(device)
    fused = FusedLlama(plain.config).to(device)
    fused.load_state_dict(plain.state_dict())
    input_ids, labels = batch
    labels[0, 9] = SPECIAL
    plain_loss = plain(input_ids, labels=labels.masked_fill(labels == SPECIAL, -100)).loss
    assert_same_training(plain, fused, plain_loss, fused(input_ids, labels=labels).loss)


class TestLikeTransformers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_dtypes(self, dtype, backend, device, no_worse):
        logits = torch.randn(2, 5, V, device=device).to(dtype)
        labels = torch.randint(0, V, (2, 5), device=device)
        results = []
        for function, wide, extra in (
            (fused_causal_lm_loss, dtype, {"backend": backend}),
            (ForCausalLMLoss, dtype, {}),
            (ForCausalLMLoss, torch.float64, {}),
        ):
            leaf = logits.to(wide).requires_grad_()
            loss = function(leaf, labels, vocab_size=V, **extra)
            results.append((loss, *torch.autograd.grad(loss, leaf, torch.tensor(0.7, device=device).to(loss))))
        if dtype == torch.float64:  # theirs rounds the logits to float32
            assert results[0][0].dtype == torch.float64
            torch.testing.assert_close(results[0][0].float(), results[1][0])
            return
        true = F.cross_entropy(logits[:, :-1].double().transpose(1, 2), labels[:, 1:])
        no_worse("loss", results[0][0], results[1][0], true, terms=V)
        no_worse("dlogits", results[0][1], results[1][1], results[2][1], terms=V)

    def test_shift_labels(self, backend, device):
        logits, labels = torch.randn(2, 5, V, device=device), torch.randint(0, V, (2, 5), device=device)
        expected = ForCausalLMLoss(logits, None, vocab_size=V, shift_labels=labels)
        torch.testing.assert_close(fused_causal_lm_loss(logits, None, shift_labels=labels, backend=backend), expected)

    def test_ignore_index(self, backend, device):
        logits, labels = torch.randn(2, 5, V, device=device), torch.randint(0, 4, (2, 5), device=device)
        expected = ForCausalLMLoss(logits, labels, vocab_size=V, ignore_index=2)
        torch.testing.assert_close(fused_causal_lm_loss(logits, labels, ignore_index=2, backend=backend), expected)
        several = fused_causal_lm_loss(logits, labels, ignore_index={1, 2}, backend=backend)
        masked = labels.masked_fill((labels == 1) | (labels == 2), -100)
        torch.testing.assert_close(several, ForCausalLMLoss(logits, masked, vocab_size=V))

    def test_one_sequence_without_a_batch(self, backend, device):
        logits, labels = torch.randn(5, V, device=device), torch.randint(0, V, (5,), device=device)
        expected = ForCausalLMLoss(logits, labels, vocab_size=V)
        torch.testing.assert_close(fused_causal_lm_loss(logits, labels, backend=backend), expected)

    def test_what_a_model_hands_on_is_not_read(self, device):
        logits, labels = torch.randn(2, 5, V, device=device), torch.randint(0, V, (2, 5), device=device)
        loss = fused_causal_lm_loss(logits, labels, position_ids=None, cu_seq_lens_q=1, colour=3)
        assert torch.equal(loss, fused_causal_lm_loss(logits, labels))


def test_options_reach_the_loss(backend, device):
    logits = torch.randn(2, 5, V, device=device).bfloat16()
    labels = torch.randint(0, V, (2, 5), device=device)
    weight = torch.rand(V, device=device)  # float32, as the loss is
    loss, stats = fused_causal_lm_loss(logits, labels, weight=weight, label_smoothing=0.1, return_stats=True,
                                       backend=backend)  # fmt: skip
    expected = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], weight, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert stats.num_tokens == 8
    assert stats.lse.shape == (2, 5)


def test_token_weight_is_shifted_with_the_labels(backend, device):
    logits, labels = torch.randn(2, 5, V, device=device), torch.randint(0, V, (2, 5), device=device)
    token_weight = torch.rand(2, 5, device=device)
    loss = fused_causal_lm_loss(logits, labels, token_weight=token_weight, backend=backend)
    rows = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(loss, (rows * token_weight[:, 1:]).sum() / token_weight[:, 1:].sum())


def test_sliced_logits_are_not_copied(backend, device, monkeypatch):
    """logits[:, :-1] reaches the kernels as it is: same memory, two row strides."""
    seen = []
    kernels = backends.implementation(backends.choose(backend, torch.device(device)), torch.device(device))
    name = "forward_reduce" if backend == "triton" else "forward"
    original = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda of, *a, **k: seen.append(of.x.data_ptr()) or original(of, *a, **k))
    logits = torch.randn(2, 6, V, device=device)
    fused_causal_lm_loss(logits[:, 1:], torch.randint(0, V, (2, 5), device=device), backend=backend)
    assert seen == [logits[:, 1:].data_ptr()]


class TestErrors:
    labels = torch.tensor([[1, 2, 3]])
    logits = torch.randn(1, 3, 5)

    def test_vocab_size(self):
        with pytest.raises(ValueError, match="vocab_size.*5.*6"):
            fused_causal_lm_loss(self.logits, self.labels, vocab_size=6)

    def test_labels_shape(self):
        with pytest.raises(ValueError, match=r"labels.*\(1, 3\).*\(1, 4\)"):
            fused_causal_lm_loss(self.logits, torch.zeros(1, 4, dtype=torch.long))

    def test_no_labels(self):
        with pytest.raises(TypeError, match="labels.*NoneType"):
            fused_causal_lm_loss(self.logits, None)

    def test_label_out_of_range(self):
        with pytest.raises(IndexError, match="target 5 is out of bounds"):
            fused_causal_lm_loss(self.logits, torch.tensor([[1, 5, 3]]))
