"""From logits to a token."""

import torch

from dalle_fast.sampling import keep_top_k, keep_top_p, sample

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 1.0]])


def test_top_k_keeps_the_k_largest():
    assert torch.isfinite(keep_top_k(LOGITS, 2)).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert torch.equal(keep_top_k(LOGITS, 9), LOGITS)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    # Probabilities of the first row: 0.644, 0.237, 0.087, 0.032.
    for p, kept in ((0.6, 1), (0.65, 2), (0.88, 2), (0.9, 3), (1.0, 4)):
        assert torch.isfinite(keep_top_p(LOGITS, p))[0].sum() == kept, p
    assert torch.isfinite(keep_top_p(LOGITS, 1e-9)).sum(1).tolist() == [1, 1]


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    drawn = sample(LOGITS[:1].expand(40_000, -1), generator, temperature=0.7)
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, (LOGITS[0] / 0.7).softmax(0), atol=0.01, rtol=0)


def test_low_temperature_is_the_argmax_and_the_input_stays():
    logits = LOGITS.clone()
    assert sample(logits, temperature=1e-3).tolist() == [0, 2]
    assert torch.equal(logits, LOGITS)


def test_excluded_tokens_are_never_drawn():
    drawn = sample(LOGITS[:1].expand(5_000, -1), torch.Generator().manual_seed(1), temperature=5.0, top_k=2, top_p=0.99)
    assert set(drawn.tolist()) == {0, 1}
