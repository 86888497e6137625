"""DTensor on two ranks: batch-sharded inputs without communication. Run as a script, this file is one rank."""

import subprocess
import sys

import torch
from test_torch import OPERATORS, example, operator

import lvtp

RANKS = 2


def test_dtensors_on_two_ranks(tmp_path):
    command = [sys.executable, __file__, tmp_path / "store"]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(RANKS)]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(said)


def test_importing_lvtp_does_not_import_dtensor():
    script = "import lvtp, sys; print('torch.distributed.tensor' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"


def check_one_rank(store: str, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))

    def placed(args, placement):
        return [distribute_tensor(a, mesh, [placement]) if isinstance(a, torch.Tensor) else a for a in args]

    def whole(results):
        results = results if isinstance(results, tuple) else (results,)
        assert all(isinstance(r, DTensor) for r in results)
        return results[0].placements[0], [r.full_tensor() for r in results]

    def equal(got, want):
        want = want if isinstance(want, tuple) else (want,)
        return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))

    # The package's functions register the rules by themselves, also where they are traced.
    x, s = placed(example("id_selection", b=4)[:2], Shard(0))
    compiled = torch.compile(lambda x, s: lvtp.id_selection(x, s, 5), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, s).full_tensor(), lvtp.id_selection(x.full_tensor(), s.full_tensor(), 5))

    # A batch that does not divide evenly is no matter.
    features, importance, *rest = example("id_selection", b=3)
    want = lvtp.id_selection(features, importance, *rest)
    x, s, *r = placed((features, importance, *rest), Shard(0))
    with CommDebugMode() as communication:
        keep = lvtp.id_selection(x, s, *r)
        kept, _ = lvtp.take(x, keep)
    assert communication.get_total_counts() == 0
    assert whole(keep)[0] == Shard(0)
    assert torch.equal(whole(keep)[1][0], want)
    assert kept.to_local().shape[0] == x.to_local().shape[0]
    assert torch.equal(whole(kept)[1][0], lvtp.take(features, want)[0])

    for name in OPERATORS:
        args = example(name, b=4)
        want = operator(name)(*args)
        for placement in (Shard(0), Replicate()):
            there = placed(args, placement)
            with CommDebugMode() as communication:
                got = operator(name)(*there)
            if name != "dynamic_budget":
                assert communication.get_total_counts() == 0, (name, placement)
            came, got = whole(got)
            assert equal(got, want), (name, placement)
            assert came == (Replicate() if name == "dynamic_budget" else placement), (name, placement)

    # Sharded by tokens, or in several ways: gathered, or moved to shards of the batch.
    for b, placements in ((4, (Shard(1),) * 2), (1, (Shard(1),) * 2), (4, (Shard(2), Shard(0)))):
        features, importance, *_ = example("id_selection", b=b)
        x, s = (placed((t,), p)[0] for t, p in zip((features, importance), placements, strict=True))
        with CommDebugMode() as communication:
            got = lvtp.id_selection(x, s, 5)
        assert communication.get_total_counts() > 0
        assert equal(whole(got)[1], lvtp.id_selection(features, importance, 5))

    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    check_one_rank(sys.argv[1], int(sys.argv[2]))
