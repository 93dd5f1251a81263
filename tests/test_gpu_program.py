"""Counts and predictions of benchmarks/gpu_program.py, without a compiler for GPUs."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_program

# Written like the compiler's output for an H100. The loop reads one row of a stacked array in each turn and
# writes one of another in place.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%fused_row (param_0: f32[5,8], param_1: s32[], param_2: f32[5,8]) -> (f32[5,8], s32[]) {
  %param_2 = f32[5,8]{1,0} parameter(2)
  %param_0 = f32[5,8]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %flat = f32[5,8]{1,0} bitcast(%param_0)
  %row = f32[1,8]{1,0} dynamic-slice(%flat, %param_1, %zero), dynamic_slice_sizes={1,8}
  %tanh = f32[1,8]{1,0} tanh(%row)
  %update = f32[5,8]{1,0} dynamic-update-slice(%param_2, %tanh, %param_1, %zero)
  %one = s32[] constant(1)
  %next = s32[] add(%param_1, %one)
  ROOT %both = (f32[5,8]{1,0}, s32[]) tuple(%update, %next)
}

%fused_less (param_3: s32[]) -> pred[] {
  %param_3 = s32[] parameter(0)
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%param_3, %five), direction=LT
}

%body (state.1: (s32[], f32[5,8], f32[5,8])) -> (s32[], f32[5,8], f32[5,8]) {
  %state.1 = (s32[], f32[5,8]{1,0}, f32[5,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state.1), index=0
  %rows = f32[5,8]{1,0} get-tuple-element(%state.1), index=1
  %results = f32[5,8]{1,0} get-tuple-element(%state.1), index=2
  %fusion.1 = (f32[5,8]{1,0}, s32[]) fusion(%rows, %i, %results), kind=kLoop, calls=%fused_row
  %new = f32[5,8]{1,0} get-tuple-element(%fusion.1), index=0
  %j = s32[] get-tuple-element(%fusion.1), index=1
  %kept = f32[5,8]{1,0} copy(%rows)
  ROOT %tuple.1 = (s32[], f32[5,8]{1,0}, f32[5,8]{1,0}) tuple(%j, %kept, %new)
}

%condition (state.2: (s32[], f32[5,8], f32[5,8])) -> pred[] {
  %state.2 = (s32[], f32[5,8]{1,0}, f32[5,8]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%state.2), index=0
  ROOT %fusion.2 = pred[] fusion(%k), kind=kLoop, calls=%fused_less
}

%fused_zeros () -> f32[5,8] {
  %zero.1 = f32[] constant(0)
  ROOT %zeros = f32[5,8]{1,0} broadcast(%zero.1), dimensions={}
}

ENTRY %main (x: f32[5,4], w: f32[4,8]) -> f32[5,8] {
  %x = f32[5,4]{1,0} parameter(0), metadata={op_name="x"}
  %w = f32[4,8]{1,0} parameter(1)
  %start = s32[] constant(0)
  %product = (f32[5,8]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"
  %rows.1 = f32[5,8]{1,0} get-tuple-element(%product), index=0
  %fusion.3 = f32[5,8]{1,0} fusion(), kind=kLoop, calls=%fused_zeros
  %tuple.2 = (s32[], f32[5,8]{1,0}, f32[5,8]{1,0}) tuple(%start, %rows.1, %fusion.3)
  %while.1 = (s32[], f32[5,8]{1,0}, f32[5,8]{1,0}) while(%tuple.2), condition=%condition, body=%body, KNOWN
  ROOT %result = f32[5,8]{1,0} get-tuple-element(%while.1), index=2
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'
ROW, ALL = 8 * 4, 5 * 8 * 4
# The library's call reads x and w and writes its result, its workspace not counted; the fusion writes zeros.
ENTRY = 4 * (5 * 4 + 4 * 8) + ALL + ALL
# The fusion reads a row and the index, and writes a row and the next index; the copy reads and writes all.
TURN = ROW + 4 + ROW + 4 + 2 * ALL


def test_counts_of_a_program_with_a_loop_a_fusion_and_a_library_call():
    counts = gpu_program.count(PROGRAM.replace("KNOWN", KNOWN), largest=2)
    assert counts["entry"] == {"kernels": 2, "traffic_bytes": ENTRY}
    (loop,) = counts["loops"]
    assert loop == {"name": "while.1", "runs": 1, "turns": 5, "kernels": 2, "traffic_bytes": 5 * TURN}
    assert counts["launches"] == 2 + 5 * 2
    # The condition is counted as traffic, though the GPU skips it: an index and a truth value in each turn.
    assert counts["traffic_bytes"] == ENTRY + 5 * (TURN + 4 + 1)
    assert counts["arrays"] == [
        {"shape": "f32[5,8]", "traffic_bytes": 2 * ALL + 5 * (2 * ROW + 2 * ALL)},
        {"shape": "f32[4,8]", "traffic_bytes": 4 * 4 * 8},
    ]


def test_a_loop_of_unknown_length_is_counted_once_with_its_condition():
    counts = gpu_program.count(PROGRAM.replace(", KNOWN", ""))
    (loop,) = counts["loops"]
    assert (loop["turns"], loop["kernels"], loop["traffic_bytes"]) == (None, 2, TURN)
    assert counts["launches"] == 2 + 2 + 1


def test_a_slice_written_into_an_array_of_the_fusion_itself_writes_the_array():
    made = PROGRAM.replace("dynamic-update-slice(%param_2,", "dynamic-update-slice(%made,").replace(
        "  %one =", "  %made = f32[5,8]{1,0} broadcast(%zero), dimensions={}\n  %one ="
    )
    (loop,) = gpu_program.count(made.replace("KNOWN", KNOWN))["loops"]
    assert loop["traffic_bytes"] == 5 * (TURN - ROW + ALL)


NESTED = """
%fused_reduce (param: f32[6,7]) -> ((f32[6], s32[6]), f32[6,7]) {
  %param = f32[6,7]{1,0} parameter(0)
  %positions = s32[6,7]{1,0} iota(), iota_dimension=1
  %largest = f32[] constant(-inf)
  %none = s32[] constant(0)
  %reduced = (f32[6]{0}, s32[6]{0}) reduce(%param, %positions, %largest, %none), dimensions={1}, to_apply=%max
  %doubled = f32[6,7]{1,0} add(%param, %param)
  ROOT %root = ((f32[6]{0}, s32[6]{0}), f32[6,7]{1,0}) tuple(%reduced, %doubled)
}

ENTRY %main (x: f32[6,7]) -> f32[6,7] {
  %x = f32[6,7]{1,0} parameter(0)
  %fusion = ((f32[6]{0}, s32[6]{0}), f32[6,7]{1,0}) fusion(%x), kind=kInput, calls=%fused_reduce
  ROOT %out = f32[6,7]{1,0} get-tuple-element(%fusion), index=1
}
"""


def test_results_in_a_tuple_within_a_tuple_are_each_written():
    counts = gpu_program.count(NESTED)
    assert counts["entry"] == {"kernels": 1, "traffic_bytes": 4 * (6 * 7 + 6 + 6 + 6 * 7)}


def test_the_longest_of_traffic_arithmetic_and_launches_bounds_a_step():
    card = gpu_program.read_card(gpu_program.H100.read_text(), tf32=494.5e12)
    # NVIDIA's data sheet: 3.35 TB/s and 67 TFLOP/s.
    assert card.bandwidth == pytest.approx(3.35e12, rel=1e-2)
    assert card.float32 == pytest.approx(67e12, rel=1e-2)
    card = gpu_program.Card(bandwidth=1e12, float32=1e12, tf32=8e12)
    counts = {"traffic_bytes": 10**9, "launches": 1000}
    predicted = gpu_program.predict(counts, 16 * 10**9, card)
    expected = {"bandwidth": 1e-3, "float32": 16e-3, "tf32": 2e-3, "launches": 1000 * gpu_program.LAUNCH}
    assert predicted["seconds"] == pytest.approx(expected)
    assert (predicted["bound"], predicted["step_s"]) == ("launches", pytest.approx(3e-3))
    assert gpu_program.predict(counts, 32 * 10**9, card)["bound"] == "tf32"


def test_an_incomplete_description_of_a_card_is_refused(tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="lacks core_count"):
        gpu_program.read_card("memory_bandwidth: 1", tf32=1.0)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")  # restored afterwards
    with pytest.raises(SystemExit, match=r"--device: .*such as h100.txtpb"):
        gpu_program.absent_gpu("nonsense")
    with pytest.raises(SystemExit):
        gpu_program.main(["omniglot", "--device", str(tmp_path / "card.txtpb")])
    assert "give both or none" in capsys.readouterr().err
