"""The targets of all stages are the teacher's own full forward pass: causal, windowed, within documents."""

from __future__ import annotations

import copy

import pytest
import torch

from mohawkify.data.packing import Batch
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.registry import load_adapter
from mohawkify.objectives.hidden_state import HiddenStateObjective
from mohawkify.objectives.logits import LogitsObjective
from mohawkify.objectives.matrix import MatrixObjective
from mohawkify.objectives.objective import Runner
from mohawkify.recipe.loading import load_recipe
from mohawkify.recipe.schema import AlignRecipe, DistillRecipe
from mohawkify.teacher.capture import LayerCall, capture_attention, layer_hooks
from tests.close import assert_close
from tests.tiny import FAMILIES, packed, tiny_pair, tiny_teacher

STAGE = {"tokens": 1000, "sequence_length": 24, "batch_sequences": 2, "learning_rate": 1e-3}


def eager_pass(family: str, batch: Batch):
    """Attentions, block outputs and logits of a separate teacher with transformers' own eager attention."""
    teacher = tiny_teacher(family, attention="eager")
    last: list[torch.Tensor] = []
    layers = find_layers(teacher, "model.layers")
    handle = layers[-1].register_forward_hook(
        lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        out = teacher(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )
    handle.remove()
    assert len(out.attentions) == len(layers)
    blocks = [*out.hidden_states[1:-1], last[0]]
    return out.attentions, blocks, out.logits


def captured_pass(family: str, batch: Batch) -> tuple[list[LayerCall], list[LayerCall]]:
    """Attention calls and block calls as the stages hear them."""
    teacher = tiny_teacher(family)
    layers = find_layers(teacher, "model.layers")
    attentions: list[LayerCall] = []
    blocks: list[LayerCall] = []
    with (
        torch.no_grad(),
        capture_attention(teacher, load_adapter(family)),
        layer_hooks({i: layer.self_attn for i, layer in enumerate(layers)}, attentions.append),
        layer_hooks(dict(enumerate(layers)), blocks.append),
    ):
        teacher(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return attentions, blocks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("borders", [(0,), (0, 9, 10)], ids=["one-document", "packed"])
def test_captured_targets_equal_the_eager_teacher(family, borders):
    batch = packed(borders=borders)
    eager_attentions, eager_blocks, _ = eager_pass(family, batch)
    attentions, blocks = captured_pass(family, batch)
    for call, expected in zip(attentions, eager_attentions, strict=True):
        assert call.attention is not None
        assert_close(f"attention {call.layer}", call.attention.probabilities(), expected)
    for call, expected in zip(blocks, eager_blocks, strict=True):
        assert_close(f"block {call.layer}", call.output_bld, expected)


def test_a_window_is_in_the_target():
    attentions, _ = captured_pass("qwen2", packed(borders=(0,)))
    matrix = attentions[-1].attention.probabilities()
    assert matrix[:, :, 20, :16].abs().max() == 0
    assert matrix[:, :, 20, 16:21].min() > 0
    assert attentions[0].attention.probabilities()[:, :, 20, :16].max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_target_sees_the_future_or_another_document(family):
    batch = packed()
    changed = batch.input_ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 90 + 3
    _, before = captured_pass(family, batch)
    _, after = captured_pass(family, batch._replace(input_ids=changed))
    first = batch.input_ids.clone()
    first[:, 4] = (first[:, 4] + 1) % 90 + 3
    _, other_document = captured_pass(family, batch._replace(input_ids=first))
    for one, two, three in zip(before, after, other_document, strict=True):
        assert torch.equal(one.output_bld[:, :12], two.output_bld[:, :12])
        assert not torch.equal(one.output_bld[:, 12:], two.output_bld[:, 12:])
        assert torch.equal(one.output_bld[:, 10:], three.output_bld[:, 10:])
        assert not torch.equal(one.output_bld[:, 4:9], three.output_bld[:, 4:9])


@pytest.mark.parametrize("family", FAMILIES)
def test_orient_loss_is_the_distance_to_the_eager_attention(family, tmp_path):
    pair, batch = tiny_pair(family, tmp_path), packed()
    attentions, blocks, _ = eager_pass(family, batch)
    layers = find_layers(pair.teacher, "model.layers")
    inputs = [pair.teacher.get_input_embeddings()(batch.input_ids), *blocks[:-1]]
    starts = batch.position_ids == 0
    expected = 0.0
    for index, mixer in enumerate(layer.self_attn for layer in find_layers(pair.student, "model.layers")):
        parts = mixer.matrix_parts(layers[index].input_layernorm(inputs[index]), starts)
        # The matrix by its definition, entry by entry.
        length = batch.input_ids.shape[1]
        matrix = torch.zeros(2, 4, length, length)
        for row in range(length):
            for source in range(row + 1):
                if starts[0, source + 1 : row + 1].any():
                    continue
                decay = parts.log_decay_blh[:, source + 1 : row + 1].sum(1).exp()
                matrix[:, :, row, source] = (parts.c_blhn[:, row] * parts.b_blhn[:, source]).sum(-1) * decay
            matrix[:, :, row, row] += parts.d_h
        expected += torch.linalg.matrix_norm(matrix - attentions[index]).mean().item()
    losses: list[float] = []
    metrics = MatrixObjective(pair, load_recipe("demo").stages.orient).run(
        batch, Runner(lambda loss: losses.append(loss.item()))
    )
    assert sum(losses) == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["block", "mixer"])
def test_align_loss_is_exactly_zero_for_the_teachers_own_attention(family, target, tmp_path):
    pair, batch = tiny_pair(family, tmp_path), packed()
    for ours, theirs in zip(
        find_layers(pair.student, "model.layers"), find_layers(pair.teacher, "model.layers"), strict=True
    ):
        ours.self_attn = copy.deepcopy(theirs.self_attn)
    stage = HiddenStateObjective(pair, AlignRecipe(target=target, **STAGE))
    metrics = stage.run(batch, Runner(lambda loss: None))
    assert metrics["loss"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_align_block_target_is_the_teachers_block_output(family, tmp_path):
    pair, batch = tiny_pair(family, tmp_path), packed()
    _, blocks, _ = eager_pass(family, batch)
    inputs = [pair.teacher.get_input_embeddings()(batch.input_ids), *blocks[:-1]]
    expected = 0.0
    for index, layer in enumerate(find_layers(pair.student, "model.layers")):
        normed = layer.input_layernorm(inputs[index])
        mixed, _ = layer.self_attn(normed, position_ids=batch.position_ids)
        middle = inputs[index] + mixed
        output = middle + layer.mlp(layer.post_attention_layernorm(middle))
        expected += (output - blocks[index]).norm(dim=-1).mean().item()
    metrics = HiddenStateObjective(pair, AlignRecipe(**STAGE)).run(batch, Runner(lambda loss: None))
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_distill_compares_with_the_teachers_own_logits(family, tmp_path):
    pair, batch = tiny_pair(family, tmp_path), packed()
    _, _, logits = eager_pass(family, batch)
    with torch.no_grad():
        student = pair.student(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits.log_softmax(-1)
    p = logits.softmax(-1)
    expected = (p * (p.log() - student)).sum(-1).mean().item()
    metrics = LogitsObjective(pair, DistillRecipe(**STAGE)).run(batch, Runner(lambda loss: None))
    assert metrics["kl"].item() == pytest.approx(expected, rel=1e-4)
