"""Counts and predictions of benchmarks/scaling.py."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmeta as jm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
import hlo
import scaling

# Programs are compiled for CPUs even where accelerators are visible, because compilers for accelerators
# express matrix products differently.
CPUS = jax.devices("cpu")


def program_of(function, *shapes):
    device = jax.sharding.SingleDeviceSharding(CPUS[0])
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=device) for shape in shapes]
    return hlo.read_program(jax.jit(function).lower(*arguments).compile().as_text())


def toy():
    return jm.prototypical(jm.nn.MLP(out=4, hidden=(8,)))


MODEL = scaling.Model("a small network", toy, image=(6,), queries=2, tasks=2, ways=3)


@pytest.mark.parametrize("count", [1, 2])
def test_one_all_reduce_per_step_carries_gradients_loss_and_metrics(count):
    if len(CPUS) < count:
        pytest.skip("needs 2 devices: JAX_NUM_CPU_DEVICES=2 pytest tests/test_scaling.py")
    row = scaling.compile_row(MODEL, CPUS[:count])
    learner, task = toy(), jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), MODEL.batch(1))
    params = jax.eval_shape(learner.init, jax.random.key(0), task)
    _, metrics = jax.eval_shape(learner.loss, params, task, jax.random.key(1))
    assert row["parameters"] == 6 * 8 + 8 + 8 * 4 + 4
    assert row["tasks"] == 2 * count
    scalars = 1 + len(jax.tree.leaves(metrics))
    size = 4 * (row["parameters"] + scalars)
    once = [{"kind": "all-reduce", "bytes": size, "devices": 2, "times": 1}]
    assert row["collectives"] == (once if count == 2 else [])
    assert row["all_reduced_bytes"] == row["moved_bytes"] == (size if count == 2 else 0)


def test_a_matrix_product_counts_two_operations_per_multiply_add():
    assert hlo.operations(program_of(jnp.matmul, (32, 48), (48, 80))) == 2 * 32 * 48 * 80
    batched = program_of(jnp.matmul, (3, 32, 48), (3, 48, 80))
    assert hlo.operations(batched) == 2 * 3 * 32 * 48 * 80


@pytest.mark.parametrize(
    ("stride", "pairs"),
    [
        (1, 2 + 3 + 3 + 3 + 2),  # of 5 positions, the outer two read one zero each
        (2, 2 + 3 + 2),  # positions 0, 2, 4
    ],
)
def test_operations_of_a_convolution_and_its_gradients_leave_out_padding(stride, pairs):
    def forward(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, kernel = (4, 5, 5, 6), (3, 3, 6, 7)
    out = jax.eval_shape(forward, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, kernel)))
    expected = 2 * 4 * 6 * 7 * pairs**2
    assert hlo.operations(program_of(forward, x, kernel)) == expected

    # A convolution is bilinear, and its gradients use the same pairs of positions.
    def grad_x(x, kernel, cotangent):
        return jax.vjp(lambda x: forward(x, kernel), x)[1](cotangent)

    def grad_kernel(x, kernel, cotangent):
        return jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](cotangent)

    assert hlo.operations(program_of(grad_x, x, kernel, out.shape)) == expected
    assert hlo.operations(program_of(grad_kernel, x, kernel, out.shape)) == expected


def test_operations_of_a_loop_count_once_per_iteration():
    def product(x, w):
        return jnp.tanh(x @ w)

    def nested(x, w):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (product(x, w), None), x, None, length=3)

        return jax.lax.scan(outer, x, None, length=7)[0]

    shapes = (16, 64), (64, 64)
    once = hlo.operations(program_of(product, *shapes))
    assert once == 2 * 16 * 64 * 64
    assert hlo.operations(program_of(nested, *shapes)) == 21 * once


def test_a_loop_of_unknown_length_is_an_error():
    def halve(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)

    with pytest.raises(ValueError, match="does not know the length"):
        program_of(halve, (4,))


# Written like a TPU compiler's output: S(1) is on-chip memory, and products are convolutions.
ON_CHIP = """
HloModule step

%fused (p.1: f32[8,16], p.2: f32[16,32]) -> f32[8,32] {
  %p.1 = f32[8,16]{1,0:T(8,128)S(1)} parameter(0)
  %p.2 = f32[16,32]{1,0:T(8,128)} parameter(1)
  ROOT %product = f32[8,32]{1,0:T(8,128)} convolution(%p.1, %p.2), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[8,16], w: f32[16,32]) -> f32[8,32] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %w = f32[16,32]{1,0:T(8,128)} parameter(1)
  %start = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %done = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%start)
  %part = ((f32[16,32]{1,0}), f32[4,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:4], [0:32]}
  %here = f32[4,32]{1,0:S(1)} slice-done(%part)
  %doubled = f32[4,32]{1,0:S(1)} add(%here, %here), backend_config={"estimated_cycles":"30"}
  %out = f32[8,32]{1,0} fusion(%done, %w), calls=%fused, backend_config={"estimated_cycles":"400"}
  ROOT %sum = f32[8,32]{1,0} all-reduce(%out), replica_groups=[1,4]<=[4], to_apply=%add
}
"""


def test_traffic_counts_bytes_to_and_from_main_memory():
    program = hlo.read_program(ON_CHIP)
    copied, sliced, read, written = 8 * 16, 4 * 32, 16 * 32, 8 * 32
    assert hlo.traffic(program) == 4 * (copied + sliced + read + written)
    assert hlo.operations(program) == 2 * 8 * 16 * 32
    assert hlo.cycles(program) == 430
    assert hlo.collectives(program) == [
        {"kind": "all-reduce", "bytes": 4 * written, "devices": 4, "times": 1}
    ]


BATCHED = """
HloModule step

ENTRY %main (x: f32[3,8,16], w: f32[3,16,32]) -> f32[3,8,32] {
  %x = f32[3,8,16]{2,1,0} parameter(0)
  %w = f32[3,16,32]{2,1,0} parameter(1)
  ROOT %out = f32[3,8,32] convolution(%x, %w), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
}
"""


def test_operations_of_batched_products_written_as_a_convolution():
    assert hlo.operations(hlo.read_program(BATCHED)) == 2 * 3 * 8 * 16 * 32


def test_ring_all_reduce_sends_all_but_its_own_part_twice():
    for devices in (1, 2, 8, 256):
        assert scaling.ring_bytes(1024, devices) == 2 * (devices - 1) * (1024 / devices)


TPU, H100 = scaling.ACCELERATORS.values()


@pytest.mark.parametrize(
    ("accelerator", "devices", "transfer", "latency"),
    [
        (TPU, 8, 1.75e8 / (2 * 50e9), 2 * (1 + 3) * 1e-6),  # 2 × 4, two lines
        (TPU, 256, 2 * 255 / 256 * 1e8 / (2 * 100e9), 2 * (15 + 15) * 1e-6),  # 16 × 16, two rings
        (H100, 8, 1.75e8 / 450e9, 2 * 7 * 1.2e-6),
        (H100, 64, 1.75e8 / 450e9 + 1.75e8 / 8 / 50e9, 2 * (7 * 1.2 + 3 * 8.5) * 1e-6),
    ],
)
def test_predicted_step_is_work_plus_all_reduce(accelerator, devices, transfer, latency):
    point = scaling.predict(5e-3, 10**8, accelerator, devices)
    step = 5e-3 + transfer + latency
    expected = {"work": 5e-3, "transfer": transfer, "latency": latency, "step": step}
    assert point["seconds"] == pytest.approx(expected)
    assert point["efficiency"] == pytest.approx(5e-3 / step)


@pytest.mark.parametrize("accelerator", [TPU, H100])
def test_efficiency_rises_with_work_and_falls_with_bytes(accelerator):
    assert scaling.predict(1e-3, 10**6, accelerator, 1)["efficiency"] == 1
    for devices in scaling.PREDICTED[1:]:
        by_work = [scaling.predict(t, 10**6, accelerator, devices)["efficiency"] for t in (1e-4, 1e-3, 1e-2)]
        by_size = [
            scaling.predict(1e-3, size, accelerator, devices)["efficiency"] for size in (0, 10**6, 10**8)
        ]
        assert 0 < by_work[0] < by_work[1] < by_work[2] < 1
        assert 1 > by_size[0] > by_size[1] > by_size[2] > 0


def test_predictions_of_a_tpu_use_its_own_program_and_compiler_cycles():
    row = {
        "model": "conv4",
        "devices": 8,
        "collectives": [],
        "all_reduced_bytes": 0,
        "memory_bytes": 1,
        "operations": 197e9,
        "traffic_bytes": 2 * 819e6,
    }
    rows = [row | {"kind": "cpu", "cycles": 0}, row | {"kind": "TPU v5 lite", "cycles": 4.5e6}]
    predictions = scaling.predictions_of(rows)
    work = {
        (prediction["accelerator"], prediction["work"]): prediction["points"][0]["seconds"]["work"]
        for prediction in predictions
    }
    expected = {("TPU v5e", "roofline"): 2e-3, ("TPU v5e", "compiler's cycles"): 3e-3}
    assert work == pytest.approx(expected | {("H100 SXM", "roofline"): 2 * 819e6 / 3.35e12})
    assert {prediction["label"] for prediction in predictions} == {"predicted, not measured"}
    assert scaling.predictions_of([row | {"kind": "cpu", "devices": 1}]) == []
    gathered = {"kind": "all-gather", "bytes": 4, "devices": 8, "times": 1}
    with pytest.raises(ValueError, match="all-gather cross devices"):
        scaling.predictions_of([row | {"kind": "cpu", "collectives": [gathered]}])


def test_predictions_of_a_gpu_use_the_traffic_and_launches_of_its_own_program():
    on_cpus = {
        "model": "conv4",
        "devices": 8,
        "kind": "cpu",
        "collectives": [],
        "all_reduced_bytes": 4,
        "memory_bytes": 1,
        "operations": 494.5e9,
        "traffic_bytes": 1,
        "cycles": 0,
    }
    counted = {"argument_bytes": 10, "temporary_bytes": 20, "traffic_bytes": 2 * 3.35e9}
    rows = [{"row": "conv4", **counted, "seconds": {"launches": 3e-3}}, {"row": "omniglot"}]
    (row,) = scaling.gpu_rows({"kind": H100.kind, "rows": rows}, [on_cpus])
    assert (row["all_reduced_bytes"], row["memory_bytes"]) == (4, 30)

    def of_h100(**changes):
        predictions = scaling.predictions_of([on_cpus, row | changes])
        (prediction,) = (each for each in predictions if each["accelerator"] == "H100 SXM")
        assert prediction["program"] == H100.kind
        return prediction["points"][0]["seconds"]["work"], prediction["bound"]

    # On 256 devices the all-reduce takes 2 (7 · 1.2 + 5 · 8.5) = 101.8 µs, 19 of which are 1.93 ms.
    work, text = of_h100()
    assert work == pytest.approx(3e-3)
    assert "bound by launches" in text
    assert "efficiency: about 1." in text
    # The launches do not grow with the tasks: 4 have 1 ms of traffic or arithmetic, 8 have 2 ms.
    work, text = of_h100(launch_s=1.5e-3, traffic_bytes=3.35e9)
    assert work == pytest.approx(1.5e-3)
    assert "efficiency: about 8." in text
    assert of_h100(launch_s=1e-3)[0] == pytest.approx(2e-3)
    assert of_h100(launch_s=0.0, traffic_bytes=1)[0] == pytest.approx(1e-3)


def test_unknown_topology_or_device_count_is_refused(capsys):
    with pytest.raises(SystemExit, match=r"--topology: got nonsense.*such as v5e:2x4"):
        scaling.topology_devices("nonsense")
    with pytest.raises(SystemExit):
        scaling.main(["--devices", "0"])
    assert "got '0'; it must be a whole number, at least 1" in capsys.readouterr().err
