import pytest
import torch

from am_memory.solver import OMP, Block, attention_scores, naive, omp


@pytest.mark.parametrize("is_relative", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("seq_len", "num_queries", "num_slots"), [(1, 3, 1), (63, 200, 17), (500, 700, 30)])
def test_omp_picks_the_keys_that_refits_from_scratch_pick(
    make_block, seq_len, num_queries, num_slots, dtype, is_relative
):
    block = make_block(2, seq_len, num_queries, dtype=dtype)
    indices = OMP(relative_mass=is_relative)(block, attention_scores(block), torch.tensor([num_slots, num_slots]))
    assert indices.tolist() == [naive.omp(naive.Head.of(block, head), num_slots, is_relative) for head in range(2)]


@pytest.mark.parametrize("selection", [OMP(), OMP.fast(), OMP(picks_per_step=3, refit_interval=2)])
def test_picks_are_distinct(make_block, selection):
    block = make_block(2, 150)
    indices = selection(block, attention_scores(block), torch.tensor([150, 150]))
    assert [sorted(head) for head in indices.tolist()] == [list(range(150))] * 2


def test_a_ragged_batch_picks_what_each_head_picks_alone(make_block):
    block = make_block(3)
    scores = attention_scores(block)
    together = OMP()(block, scores, torch.tensor([20, 1, 7]))
    for head, num_slots in enumerate([20, 1, 7]):
        one = slice(head, head + 1)
        alone = Block(block.query[one], block.key[one], block.value[one], block.scaling)
        assert OMP()(alone, scores[one], torch.tensor([num_slots]))[0].tolist() == together[head, :num_slots].tolist()
        assert (together[head, num_slots:] == together[head, 0]).all()


@pytest.mark.parametrize("is_rising", [True, False])
def test_duplicate_keys_are_picked_once_and_the_rest_goes_to_the_highest_scores(make_block, is_rising):
    distinct = make_block(1, 3)
    repeated = [0, 0, 1, 1, 1, 2, 2, 2]
    block = Block(distinct.query, distinct.key[:, repeated], distinct.value[:, repeated], distinct.scaling)
    scores = torch.linspace(0.1, 0.8, 8)[None] if is_rising else torch.linspace(0.8, 0.1, 8)[None]
    picks = OMP()(block, scores, torch.tensor([8]))[0].tolist()
    assert sorted(repeated[pick] for pick in picks[:3]) == [0, 1, 2]
    assert picks[3:] == sorted(set(range(8)) - set(picks[:3]), reverse=is_rising)


def test_a_key_of_no_weight_comes_last(make_block):
    distinct = make_block(1, 3)
    repeated = [0, 0, 1, 2, 2]
    key_bias = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0, 0.0]])
    block = Block(
        distinct.query, distinct.key[:, repeated], distinct.value[:, repeated], distinct.scaling, key_bias=key_bias
    )
    picks = OMP()(block, attention_scores(block), torch.tensor([5]))[0].tolist()
    assert sorted(repeated[pick] for pick in picks[:3]) == [0, 1, 2]
    assert picks[4] == 0


def test_a_hundred_picks_are_those_of_the_definition(make_block):
    block = make_block(1, 200, 400)
    indices = OMP()(block, attention_scores(block), torch.tensor([100]))
    assert indices[0].tolist() == naive.omp(naive.Head.of(block, 0), 100)


@pytest.mark.parametrize(("picks_per_step", "refit_interval"), [(2, 1), (1, 3), (4, 2)])
def test_several_picks_per_refit_come_from_one_set_of_correlations(make_block, picks_per_step, refit_interval):
    block = make_block(1, 63, 200)
    selection = OMP(picks_per_step=picks_per_step, refit_interval=refit_interval)
    indices = selection(block, attention_scores(block), torch.tensor([21]))
    expected = naive.omp(naive.Head.of(block, 0), 21, picks_per_refit=picks_per_step * refit_interval)
    assert indices[0].tolist() == expected


def test_the_fast_schedule_refits_after_every_key_at_first_and_every_eighth_at_last():
    schedule = [OMP.fast().picks_before_refit(num_chosen) for num_chosen in (0, 299, 300, 1499, 1500, 9000)]
    assert schedule == [1, 1, 4, 4, 8, 8]


def test_picks_do_not_depend_on_how_heads_share_the_memory(make_block, monkeypatch):
    block = make_block(3)
    scores = attention_scores(block)
    together = OMP()(block, scores, torch.tensor([20, 20, 20]))
    monkeypatch.setattr(omp, "MAX_GRAM_ELEMENTS", 1)
    assert OMP()(block, scores, torch.tensor([20, 20, 20])).tolist() == together.tolist()


def test_the_panels_of_the_gram_matrix_make_it_whole(make_block, monkeypatch):
    block = make_block(1)
    monkeypatch.setattr(omp, "GRAM_PANEL", 10)
    gram, target = omp.mass_system([block], is_relative=True)
    head = naive.Head.of(block, 0)
    column, mass = naive.mass_system(head, head.share)
    torch.testing.assert_close(gram[0].double(), column.T @ column, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(target[0].double(), column.T @ mass, rtol=1e-4, atol=1e-6)
