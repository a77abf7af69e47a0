"""A language model larger than one chip: its tensors go to their shards as they are read."""

import gc

import jax
import numpy as np
import pytest

from fusion_jax.pretrained import load
from fusion_jax.pretrained.save import save
from fusion_jax.training import plain_language, runtime
from fusion_jax.training.partition import paths
from fusion_jax.training.sharding import make_mesh, put_batch
from fusion_jax.training.state import init_frozen, init_state, plan_state
from fusion_jax.training.step import compile_step

CONFIG = {  # of sizes that no other test has
    "model_type": "llama",
    "vocab_size": 528,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    family = load.family_of(CONFIG)
    init = jax.jit(family.build(CONFIG).init)
    path = tmp_path_factory.mktemp("spread") / "model"
    save(path, init(jax.random.key(0), *family.inputs(CONFIG))["params"], CONFIG)
    return path


def trained(experiment, mesh):
    """Losses of a few steps, and all that is held then."""
    plan = plan_state(experiment, mesh)
    frozen, state = init_frozen(experiment, plan, 0), init_state(experiment, plan, 0)
    step = compile_step(experiment.objective, experiment.optimizer, mesh, plan.state_shardings)
    losses = []
    for index in range(3):
        state, metrics = step(state, frozen, put_batch(experiment.data[index], mesh))
        losses.append(float(metrics["loss"]))
    return losses, (frozen, state)


@pytest.mark.parametrize(("scan", "rank"), [(False, 0), (True, 2)])  # rank 0: all are trained
def test_no_device_holds_a_whole_param_that_is_split(folder, scan, rank):
    settings = plain_language.Settings(
        language_model=str(folder),
        mesh="fsdp=4,tensor=2",
        scan=scan,
        batch_size=8,
        length=8,
        chunks=1,
        lora_rank=rank,
    )
    runtime.start(settings)
    experiment, mesh = plain_language.build(settings), make_mesh(settings.mesh)
    plan = plan_state(experiment, mesh)
    wanted = paths(plan.state.params) | paths(plan.frozen)
    losses, held = trained(experiment, mesh)
    split = set()
    for path, leaf in paths(experiment.pretrained).items():
        assert leaf.sharding.is_equivalent_to(wanted[path].sharding, leaf.ndim), path
        if path.endswith(("kernel", "embedding")):
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}
            split.add(leaf.shape[-2:])
    assert len(split) == 4
    gc.collect()
    there = [shard.data.shape for leaf in jax.live_arrays() for shard in leaf.addressable_shards]
    assert not split & {shape[-2:] for shape in there}
    del held

    runtime.compute_as(settings)
    one = make_mesh("data=1", jax.devices()[:1])
    alone, _ = trained(plain_language.build(settings), one)
    np.testing.assert_allclose(losses, alone, atol=1e-5)
    assert alone[-1] < alone[0]
