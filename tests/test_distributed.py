"""RHO-LOSS in two processes, with gloo on the CPU."""
from pathlib import Path

import pytest
import torch
from helpers import two_processes

pytestmark = pytest.mark.slow # two processes

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    pytest.importorskip('accelerate', reason='distributed training needs accelerate')
    out = tmp_path_factory.mktemp('ranks')
    two_processes(Path(__file__).parent/'distributed_rho_loss.py', out, out=out/'log')
    return [torch.load(out/f'rank{rank}.pt', weights_only=False) for rank in (0, 1)]


def test_each_rank_selects_from_its_own_candidates(ranks):
    for rank in ranks:
        assert len(rank['candidates']) == len(rank['selected']) > 0
        for candidates, selected in zip(rank['candidates'], rank['selected']):
            assert set(selected.tolist()) <= set(candidates.tolist())
        assert {len(o) for o in rank['selected']} == {4}
    first_epoch = [set(torch.cat(rank['candidates'][:len(rank['candidates'])//2]).tolist()) for rank in ranks]
    assert not first_epoch[0] & first_epoch[1]


def test_every_row_meets_its_own_irreducible_loss(ranks):
    for rank in ranks:
        assert len(rank['il_met']) == len(rank['candidates'])
        for rows, il in zip(rank['candidates'], rank['il_met']): assert torch.equal(il, rank['il'][rows])


def test_both_end_with_the_same_weights(ranks):
    for a, b in zip(*[rank['weights'] for rank in ranks]): assert torch.equal(a, b)


def test_the_ledger_counts_both(ranks):
    loaded = sum(len(o) for rank in ranks for o in rank['candidates'])
    trained = sum(len(o) for rank in ranks for o in rank['selected'])
    for rank in ranks:
        assert sum(rank['ledger']['loaded']) == loaded and sum(rank['ledger']['trained']) == trained
        counts = torch.bincount(torch.cat([o for r in ranks for o in r['selected']]), minlength=200)
        assert torch.equal(rank['counts'].long(), counts)
        assert rank['seen'].sum() == loaded


def test_folds_are_shared_out_and_every_rank_holds_the_whole_table(ranks):
    assert torch.equal(ranks[0]['crossfit'], ranks[1]['crossfit'])
    assert torch.isfinite(ranks[0]['crossfit']).all()


def test_divbs_takes_what_its_rule_takes_of_each_ranks_candidates(ranks):
    for rank in (o['divbs'] for o in ranks):
        assert len(rank['selected']) == len(rank['by_rule']) > 0
        for candidates, selected, expected in zip(rank['candidates'], rank['selected'], rank['by_rule']):
            assert set(selected.tolist()) <= set(candidates.tolist()) and torch.equal(selected, expected)
    assert torch.equal(*(o['divbs']['weights'] for o in ranks))
    assert ranks[0]['divbs']['ledger']['trained'] == ranks[1]['divbs']['ledger']['trained']


def test_tokens_of_both_processes_are_counted(ranks):
    assert torch.equal(*(o['tokens']['weights'] for o in ranks))
    for rank in ranks:
        assert rank['tokens']['ledger']['elements_loaded'] == [200, 200]
        assert rank['tokens']['ledger']['elements_trained'] == [100, 100]
    assert all(o['tokens']['ledger']['selected'] == [0.5, 0.5] for o in ranks)


def test_what_cannot_be_shared_out_says_why(ranks):
    for rank in ranks:
        assert 'a row goes to another one each epoch: use staleness=1' in rank['refused']['staleness']
        assert "each process's queue would be full at another time" in rank['refused']['queue']
