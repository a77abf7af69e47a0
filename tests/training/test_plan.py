"""Plans say what compilers say, memory falls as a mesh grows, collectives are the expected ones."""

import importlib.util
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from fusion_jax.__main__ import main
from fusion_jax.errors import UserError
from fusion_jax.language.mixture import Mixture
from fusion_jax.pretrained import load, sizes
from fusion_jax.training import collectives, flops, plain_language, plan, runtime
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.settings import Settings
from fusion_jax.training.sharding import AXES, BATCH, make_mesh, mesh_shape, tree_shardings
from fusion_jax.training.state import init_state
from fusion_jax.training.step import compile_step

SMALL = {"vocab_size": 512, "num_key_value_heads": 4, "head_dim": 16}
FAMILIES = {
    "llama": sizes._config("llama", 64, 128, 1, 4, **SMALL),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sizes, "CONFIGS", sizes.CONFIGS | FAMILIES)
    yield
    load.use(load.Computing())
    load.opened.clear()
    jax.config.update("jax_enable_compilation_cache", True)


def build(settings):
    runtime.compute_as(settings)
    load.opened[settings.language_model] = sizes.hollow(settings.language_model)
    return plain_language.build(settings)


def of(name="llama", rank=0, **rest):
    fixed = {"batch_size": 8, "length": 16, "chunks": 1, "scan": True, "remat": True}
    return plain_language.Settings(language_model=name, lora_rank=rank, **fixed | rest)


PUBLISHED = {  # what the files of the weights say
    "smollm2-135m": 134_515_008,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
}


def test_named_sizes_have_as_many_params_as_published():
    assert {name: sizes.count(name) for name in PUBLISHED} == PUBLISHED


def toy(smallest=64):
    """A step of a few matrices: quick to compile."""

    def init(key):
        up, down = jax.random.split(key)
        return {
            "up": {"kernel": jax.random.normal(up, (64, smallest * 8))},
            "down": {"kernel": jax.random.normal(down, (smallest * 8, 64))},
        }

    def objective(params, batch, rng):
        hidden = jnp.tanh(batch["x"] @ params["up"]["kernel"])
        return jnp.mean((hidden @ params["down"]["kernel"]) ** 2), {}

    data = [{"x": np.ones((16, 64), np.float32)}]
    return Experiment(data, init, objective, optax.adamw(1e-2))


def test_planned_memory_is_what_the_compiler_reports():
    """For the backend that is here, of the step that training itself compiles."""
    experiment, mesh = toy(), make_mesh("data=2,fsdp=4")
    needs = plan.measure(experiment, Settings(), mesh)
    where, batch = plan.shapes_of(experiment, mesh)
    step = compile_step(experiment.objective, experiment.optimizer, mesh, where.state_shardings)
    memory = step.lower(where.state, where.frozen, batch).compile().memory_analysis()
    scalars = 2 * 4  # step and seed
    reads = memory.argument_size_in_bytes
    assert reads == needs.held + needs.batch + scalars
    assert needs.activations == memory.temp_size_in_bytes > 0
    code = memory.generated_code_size_in_bytes
    total = reads + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert needs.peak == total + needs.activations + code


def test_params_and_optimizer_fall_as_one_in_n():
    """By compiled memory, by shapes as planned, and in the buffers of a real state."""
    whole = plan.measure(toy(), Settings(), make_mesh())
    for shards in (2, 8):
        mesh = make_mesh(f"data=-1,fsdp={shards}")
        part = plan.measure(toy(), Settings(), mesh)
        assert whole.params == shards * part.params
        assert whole.optimizer - 4 == shards * (part.optimizer - 4)  # Adam counts its steps
    state = init_state(toy(), plan.plan_state(toy(), mesh), 0)
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves((state.params, state.opt_state))
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[3]
    )
    assert held == part.params + part.optimizer


def test_collectives_are_those_of_fsdp():
    """Params are gathered and gradients reduced; only vectors that were looked up are exchanged."""
    settings = of()
    needs = plan.measure(build(settings), settings, make_mesh("fsdp=-1"))
    assert needs.sent.keys() <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    looked_up = 4 * 16 * 64  # float32, a row of 16 tokens on each device, width 64
    assert needs.counts["all-to-all"] == 2
    assert needs.sent["all-to-all"] <= 2 * looked_up
    assert needs.sent["all-gather"] >= 2 * needs.params  # forward and backward
    alone = plan.measure(toy(), Settings(), make_mesh("data=-1"))
    assert alone.sent.keys() == {"all-reduce"}
    assert alone.sent["all-reduce"] == pytest.approx(2 * alone.params * 7 / 8, rel=0.01)


@pytest.mark.parametrize("sizes", ["data=2,tensor=4", "fsdp=2,tensor=4"])
def test_a_mixture_is_the_same_in_shares(sizes):
    """Each device has its own experts, and sorts its own tokens: no other's kernels come to it."""
    mixture = Mixture(experts=8, chosen=3, hidden_width=24)
    hidden = jax.random.normal(jax.random.key(0), (8, 3, 16))
    params = {"mlp": mixture.init(jax.random.key(1), hidden)["params"]}

    def loss(params, hidden):
        out = mixture.apply({"params": params["mlp"]}, hidden)
        return (out**2).mean(), out

    plain = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    mesh = make_mesh(sizes)

    def step(params, hidden):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return plain(params, hidden)

    placed = jax.device_put(
        (params, hidden), (tree_shardings(params, mesh), NamedSharding(mesh, BATCH))
    )
    gate = placed[0]["mlp"]["gate"]
    assert {shard.data.shape[0] for shard in gate.addressable_shards} == {2}  # of 8 experts
    traced = jax.jit(step).trace(*placed)
    compiled = traced.lower().compile()
    near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, compiled(*placed), jax.jit(plain)(params, hidden))
    assert flops.count(traced.jaxpr) == flops.count(jax.make_jaxpr(plain)(params, hidden))

    text = compiled.as_text()
    sent, _ = collectives.traffic(text)
    assert "all-to-all" not in sent and ("all-gather" in sent) == ("fsdp" in sizes)
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", text)
    assert all(math.prod(map(int, shape.split(","))) <= 2 * 16 * 24 for shape in gathered)


def test_flops_count_loops_and_recomputation():
    matrix = jnp.ones((8, 8))

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ matrix, None), x, length=5)[0]

    assert flops.count(jax.make_jaxpr(scanned)(matrix)) == 5 * 2 * 8**3
    looped = jax.make_jaxpr(lambda n: jax.lax.fori_loop(0, n, lambda _, c: c @ matrix, matrix))(3)
    assert flops.count(looped, loops=7) == 7 * 2 * 8**3
    settings, mesh = of(), make_mesh("data=1", jax.devices()[:1])
    once = plan.useful_flops(build, settings, mesh, 1)
    again = flops.count(plan.trace(build(settings), settings, mesh).jaxpr)
    assert 1.1 < again / once < 1.4
    unrolled = of(scan=False, remat=False)
    assert flops.count(plan.trace(build(unrolled), unrolled, mesh).jaxpr) == once


def test_a_base_of_few_bits_is_planned_as_small_as_it_is():
    mesh, held = make_mesh("data=1", jax.devices()[:1]), {}
    for base in ("full", "nf4"):
        settings = of(rank=2, base=base)
        experiment = build(settings)
        planned, _ = plan.shapes_of(experiment, mesh)
        held[base] = plan.bytes_per_device(planned.frozen)
        plan.trace(experiment, settings, mesh)
    assert 0.13 < held["nf4"] / held["full"] < 0.16  # 4 bits and a scale for 64, of 32
    with pytest.raises(UserError, match="no file that stores it"):
        build(of(base="stored"))


def test_collectives_in_each_way_of_writing():
    hlo = """
%body (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %b = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), channel_id=2, replica_groups={{0,1},{2,3}}
  %c = f32[8]{0} all-gather-done(%b)
}
%condition (p: f32[8]) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%p), condition=%condition, body=%body
  %r = bf16[4]{0} reduce-scatter(%w), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'y'}
  %s = f32[8]{0} all-reduce(%w), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  %t = f32[8]{0} all-reduce(%w), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    sent, counts = collectives.traffic(hlo)
    assert counts == {"all-gather": 6, "reduce-scatter": 1, "all-reduce": 1}
    assert sent == {
        "all-gather": 3 * (32 * 3 / 4 + 32 / 2),
        "reduce-scatter": 4 * 2 * 4 * 3 / 4,
        "all-reduce": 2 * 32 * 3 / 4,
    }


def test_command_plans_and_sweeps(capsys):
    line = ["plan", "--llm", "llama", "--length", "16", "--batch-size", "8", "--mesh", "fsdp=-1"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "peak" in said and "all-gather" in said and "FLOPs" in said
    for wrong, told in (
        (["plan"], "Give an experiment, --llm NAME"),
        (["plan", "--llm", "llama", "--topology", "v0:1x1"], "topology"),
        (["plan", "--llm", "lama"], "no size 'lama'; known are smollm2-135m"),
        ([*line, "--batch-size", "12"], "a batch of 12 rows cannot be split over 8"),
        (["plan", "--llm", "lama", "--sweep"], "none of these shapes"),
    ):
        assert main(wrong) == 2
        assert told in capsys.readouterr().err
    assert main([*line, "--batch-size", "1", "--sweep"]) == 0  # only one shape takes such a batch
    said = capsys.readouterr().out
    assert "│ data=1,fsdp=1,tensor=8 │" in said and said.count("│ data=") == 1
    for command in ("plan", "show-sharding"):  # what is planned has settings of its own
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0 and "--llm" in said and "--lora-rank" in said


def test_a_size_may_be_what_a_config_says(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llama"]))
    for name in (tmp_path, tmp_path / "config.json"):
        assert main(["show-sharding", "--llm", str(name), "--mesh", "fsdp=8"]) == 0
        assert "512 64" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama3-8b", "qwen3-30b-a3b", "gemma2-27b"])
def test_named_sizes_are_split_evenly_by_the_default_rules(name):
    for mesh, count, rank in (("fsdp=-1", 16, 0), ("fsdp=-1,tensor=4", 32, 16)):
        settings = of(name, rank=rank)
        devices = AbstractMesh(mesh_shape(mesh, count), AXES)
        where = plan.plan_state(build(settings), devices)
        held = plan.bytes_per_device((where.state.params, where.frozen))
        leaves = jax.tree.leaves((where.state.params, where.frozen))
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        assert total <= held * devices.size < 1.01 * total


def test_shardings_are_drawn_and_what_is_whole_is_told(capsys):
    assert main(["show-sharding", "--llm", "llama", "--mesh", "fsdp=8,tensor=4"]) == 0
    said = capsys.readouterr().out
    assert "fsdp tensor" in said and "warning" not in said and "on each device: trained" in said
    sizes.CONFIGS["llama"] = FAMILIES["llama"] | {"intermediate_size": 2**15 + 1}
    assert main(["show-sharding", "--llm", "llama", "--mesh", "tensor=64"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "mlp/up/kernel (frozen) (64, 32769) is whole on every device, 8.00 MiB" in said
    for wrong in ("fsdp=x", "fsdp", "fsdp="):
        assert main(["show-sharding", "--llm", "llama", "--mesh", wrong]) == 2
        assert "expected axis=size with axis in" in capsys.readouterr().err


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@needs_libtpu
def test_a_step_compiles_for_chips_that_are_not_here():
    from fusion_jax.training.topologies import chip_of, devices_of

    devices = devices_of("v5e:2x2")
    settings = of("llama", rank=4, batch_size=4)
    needs = plan.measure(build(settings), settings, make_mesh("fsdp=-1", devices))
    chip = chip_of(devices[0])
    assert needs.fits and chip.memory == 16 * 2**30
    assert set(needs.sent) >= {"all-gather"} and 0 < needs.mfu(chip, needs.flops) < 1
    too_many = of("llama", batch_size=4, scan=False)
    huge = FAMILIES["llama"] | {"vocab_size": 2**25}
    sizes.CONFIGS["llama"] = huge
    refused = plan.measure(build(too_many), too_many, make_mesh("data=-1", devices))
    assert not refused.fits and refused.peak > 16 * 2**30
    with pytest.raises(UserError, match="no topology"):
        devices_of("v5e:3x5x7")


def test_remedies_change_one_thing_after_another():
    found = list(plan.remedies(of(remat=False, batch_size=16), 4))
    assert all(s.scan for s in found)
    said = [(s.remat, s.mesh, s.dtype, s.accumulation) for s in found]
    assert said[:5] == [
        (True, "data=-1", "float32", 1),
        (True, "fsdp=-1", "float32", 1),
        (True, "fsdp=-1", "bfloat16", 1),
        (True, "fsdp=-1", "bfloat16", 2),
        (True, "fsdp=-1", "bfloat16", 4),
    ]
    assert found[-1].mesh == "fsdp=-1,tensor=2"
    first = next(plan.remedies(of(remat=False, batch_size=16), 4, held=True))
    assert (first.remat, first.scan, first.mesh) == (True, True, "fsdp=-1")
