"""ppo_char.py against transformers, brute force, slow loops, finite differences and literal values; its faults, its resumes.

What broke the system that this follows is caught by one number: the ratio of new to old probability, which must be 1 everywhere
before the first inner step.
"""
import copy, itertools, json, math, signal, subprocess, sys, time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import common
import ppo_char as pc
from conftest import ROOT

ALONE = ("data/quotes.txt", "data/patterns.txt")
SMALL = ["--vocab_size", "60", "--n_embd", "16", "--n_head", "2", "--prompt_len", "5", "--max_new", "7", "--prompts", "4", "--group", "4",
         "--steps", "3", "--batch_size", "8", "--iterations", "3", "--epochs", "2", "--beam", "2", "--pairs", "16"]
LINES = ["a b c d e", "b c b c b c", "x d j x d j", "the cat and the dog", "a dog and a cat", "cats", "b  c", "xdj", "the bee", "abc"] * 3


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are too small to share among threads."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def small(tmp_path):
    """args(*flags): small flags on a small corpus."""
    (tmp_path / "c.txt").write_text("\n".join(LINES))
    return lambda *flags: pc.get_args([*SMALL, "--corpus", str(tmp_path / "c.txt"), *flags])


def a_model(args, V, seed=0):
    """A model whose weights are so large that everything matters."""
    torch.manual_seed(seed)
    model = pc.Transformer(V, args.prompt_len + args.max_new, args)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("ln_" in name and "weight" in name), std=0.3 if "ln_" not in name else 0.05)
    return model


def a_batch(small, *flags, n=4, copies=4, seed=0):
    args = small(*flags)
    corpus = pc.Corpus(args)
    model = a_model(args, len(corpus.tok.tokens))
    prompts, left, _ = pc.draw_prompts(corpus.train, n, copies, args, np.random.default_rng(seed))
    return args, corpus, model, prompts, left


# ---- tokens ------------------------------------------------------------------------------------------------------------------

TOK = pc.Tokenizer(["the cat and the catalog", "a then b", "où étaient-ils?"], 60)


@settings(max_examples=200, deadline=None)
@example("", "\ufffd")
@given(st.text(alphabet="the catlogndb où", max_size=40), st.text(max_size=10))
def test_decode_undoes_encode_and_unknown_characters_have_a_token_of_their_own(known, wild):
    assert TOK.decode(TOK.encode(known)) == known
    want = "".join(ch if ch in TOK.tokens else "\ufffd" for ch in known + wild)
    assert TOK.decode(TOK.encode(known + wild)) == want
    assert TOK.encode(wild).count(pc.UNK) == sum(ch not in TOK.tokens[4:] for ch in wild)      # a U+FFFD in the text is unknown, too


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="thecatlogndb ", max_size=30))
def test_the_longest_token_is_taken_first(text):
    want, i = [], 0
    while i < len(text):
        best = max((t for t in TOK.tokens[4:] if text.startswith(t, i)), key=len)
        want.append(TOK.tokens.index(best, 4))
        i += len(best)
    assert TOK.encode(text) == want


def test_the_vocabulary_is_all_characters_then_the_most_frequent_words_up_to_the_budget():
    lines = ["to be or not to be", "to do"]
    tok = pc.Tokenizer(lines, 4 + len(set("".join(lines))) + 2)
    assert tok.tokens[4:] == [*sorted(set("".join(lines))), "to", "be"]
    with pytest.raises(SystemExit):
        pc.Tokenizer(lines, 8)


def test_prompts_are_beginnings_or_tails(small):
    args, corpus, _, _, _ = a_batch(small)
    P, R = args.prompt_len, args.max_new
    for tails in (False, True):
        ids, left, rests = pc.draw_prompts(corpus.train, 200, 2, args, np.random.default_rng(1), tails)
        assert ids.shape == (400, P) and torch.equal(ids[::2], ids[1::2])
        for row, n, rest in zip(ids[::2].tolist(), left[::2].tolist(), rests):
            assert row[:n] == [pc.PAD] * n and pc.PAD not in row[n:] and len(row[n:]) >= 1
            line = row[n:] + rest
            assert any(line == x[-len(line):] if tails else line == x for x in corpus.train)
            assert not tails or len(rest) <= R


def patterns(n, rng, alphabet="abcdefghijx"):
    """How data/patterns.txt was made: 4 to 12 letters, one after the other in the alphabet or 1 to 3 of them over and over, with
    nothing, a space or two between."""
    lines = []
    while len(lines) < n:
        between, k = ("", " ", "  ")[rng.integers(3)], int(rng.integers(4, 13))
        if rng.random() < 0.5:
            first = int(rng.integers(len(alphabet)))
            letters = [alphabet[(first + i) % len(alphabet)] for i in range(k)]
        else:
            group = [alphabet[i] for i in rng.integers(0, len(alphabet), rng.integers(1, 4))]
            letters = [group[i % len(group)] for i in range(k)]
        lines.append(between.join(letters))
    return lines


def test_the_patterns_that_ship_are_what_their_maker_makes():
    assert (ROOT / "data" / "patterns.txt").read_bytes() == ("\n".join(patterns(800, np.random.default_rng(0))) + "\n").encode()


# ---- model -------------------------------------------------------------------------------------------------------------------

def test_it_computes_what_transformers_gpt2_computes(small):
    from transformers import GPT2Config, GPT2LMHeadModel
    args = small("--n_layer", "3")
    ours, (V, T, C) = a_model(args, 50), (50, args.prompt_len + args.max_new, args.n_embd)
    ref = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=3, n_head=2, n_inner=2 * C, activation_function="relu",
                                     resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, tie_word_embeddings=False)).eval()
    w, pairs = ours.state_dict(), {"lm_head.weight": ours.lm_head.weight, "transformer.wte.weight": ours.wte.weight, "transformer.wpe.weight": ours.wpe.weight}
    for kind in ("weight", "bias"):
        pairs[f"transformer.ln_f.{kind}"] = w[f"ln_f.{kind}"]
        for i in range(3):
            for a, b in (("ln_1", "ln_1"), ("ln_2", "ln_2"), ("attn.c_attn", "qkv"), ("attn.c_proj", "proj"), ("mlp.c_fc", "up"), ("mlp.c_proj", "down")):
                x = w[f"blocks.{i}.{b}.{kind}"]
                pairs[f"transformer.h.{i}.{a}.{kind}"] = x.T if kind == "weight" and "ln" not in a else x
    ref.load_state_dict(pairs)
    ids, left = torch.randint(4, V, (3, T)), torch.tensor([0, 2, 5])
    seen = torch.arange(T) >= left[:, None]
    with torch.no_grad():
        want = ref(ids, attention_mask=seen.long(), position_ids=(torch.arange(T) - left[:, None]).clamp(min=0)).logits
        got = ours.predict(ours(ids, left))[:, :, 0] - ours.lm_head.bias
    assert (got - want)[seen].abs().max() < 1e-4


def test_rotary_is_transformers(small):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    q, k, pos = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8), torch.arange(9)[None] + torch.tensor([[0], [3]])
    angle = pos[:, :, None] * 10000**(-torch.arange(4) / 4)
    want = apply_rotary_pos_emb(q, k, torch.cat([angle, angle], 2).cos(), torch.cat([angle, angle], 2).sin())
    for x, y in zip((q, k), want):
        assert torch.allclose(pc.rotate(x, angle.cos()[:, None], angle.sin()[:, None]), y, atol=1e-6)


@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "rotary"])
def test_cache_future_and_pads_change_nothing(small, pos):
    args, _, model, prompts, left = a_batch(small, "--pos", pos)
    ids = torch.cat([prompts, torch.randint(4, 12, (len(prompts), 6))], 1)
    with torch.no_grad():
        full, cache = model(ids, left), [{} for _ in model.blocks]
        parts = torch.cat([model(part, left, cache) for part in ids.split([5, 1, 3, 2], 1)], 1)
        real = torch.arange(11) >= left[:, None]
        assert (full - parts)[real].abs().max() < 1e-5
        later = ids.clone()
        later[:, 8:] = 13
        assert torch.equal(model(later, left)[:, :8][real[:, :8]], full[:, :8][real[:, :8]])
        bare = [model(row[None, n:], torch.zeros(1, dtype=torch.long))[0] for row, n in zip(ids, left.tolist())]
        assert max((b - f[n:]).abs().max() for b, f, n in zip(bare, full, left.tolist())) < 1e-5
        swapped = ids.clone()
        swapped[:, [7, 8]] = ids[:, [8, 7]]         # and order matters
        assert (model(swapped, left)[:, -1] - full[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("N", [1, 3])
def test_the_loss_of_pretraining_against_a_loop(small, N):
    args, corpus, model, _, _ = a_batch(small, "--n_predict", str(N))
    rows, total = [line[:12] for line in corpus.train[:5]], []
    with torch.no_grad():
        for row in rows:
            logp = model.predict(model(torch.tensor([row[:-1]]), torch.zeros(1, dtype=torch.long)))[0].log_softmax(2)      # (T, N, V)
            total += [-logp[t, j, row[t + 1 + j]].item() for t in range(len(row) - 1) for j in range(N) if t + 1 + j < len(row)]
        assert pc.next_token_loss(model, rows, "cpu").item() == pytest.approx(np.mean(total), rel=1e-5)


# ---- the test that catches what broke the original ------------------------------------------------------------------------------

@pytest.mark.parametrize("N", [1, 2, 3])
@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("heat", [(1.0, 0.0), (0.7, 0.0), (1.3, 0.2), (1.0, 1.0)])
def test_log_probabilities_at_update_are_those_at_sampling(small, N, pos, heat):
    args, _, model, prompts, left = a_batch(small, "--n_predict", str(N), "--pos", pos)
    torch.manual_seed(1)
    ids, old, mask = pc.rollout(model, prompts, left, args.max_new, *heat)
    new, every, value = pc.replay(model, ids, left, args.max_new, *heat)
    assert new.shape == value.shape == mask.shape == (16, 7) and every.shape == (16, 7, model.lm_head.out_features)
    assert ((new - old).exp() - 1)[mask].abs().max() < 1e-5
    assert (every.exp().sum(2) - 1).abs().max() < 1e-5
    assert not torch.isin(ids[:, 5:][mask], torch.tensor([pc.PAD, pc.BOS, pc.UNK])).any()
    # the original read position last + 1 where collection had used last: that the ratio does see
    wrong = pc.replay(model, torch.cat([ids[:, :5], ids[:, 6:], ids[:, :1]], 1), left, args.max_new, *heat)[0]
    assert heat[1] == 1 or ((wrong - old).exp() - 1)[mask].abs().max() > 0.1


@pytest.mark.parametrize("algo", ["ppo", "grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("value", ["shared", "separate"])
@pytest.mark.parametrize("flags", [[], ["--n_predict", "2", "--temperature", "1.5", "--epsilon", "0.3", "--per_step"]])
def test_the_ratio_is_1_before_the_first_inner_step(small, tmp_path, algo, value, flags):
    args, corpus, model, _, _ = a_batch(small, "--algo", algo, "--value", value, "--reward", "letters", "--rl_lr", "0.01", *flags)
    start = copy.deepcopy(model).requires_grad_(False)
    state = pc.improve("test", algo, model, start, pc.Rule(args, corpus.tok), corpus.train, args, tmp_path / "x.pt")
    assert len(state["curve"]) == 3 and all(row[4] < 1e-5 for row in state["curve"])
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(model.parameters(), start.parameters()))


def test_tokens_come_as_often_as_their_probabilities_say(small):
    args, corpus, model, _, _ = a_batch(small)
    prompt, n = torch.tensor([[pc.BOS]]).expand(20000, 1), torch.zeros(20000, dtype=torch.long)
    for heat in ((1.0, 0.0), (0.5, 0.3)):
        with torch.no_grad():
            p = pc.policy_logp(model.predict(model(prompt[:1], n[:1]))[0, 0, 0], *heat).exp()
        torch.manual_seed(0)
        ids, _, _ = pc.rollout(model, prompt, n, 1, *heat)
        seen = torch.bincount(ids[:, 1], minlength=len(p)) / 20000
        assert ((seen - p).abs() < 5 * (p * (1 - p) / 20000).sqrt() + 1e-9).all()


def test_the_mask_ends_with_the_first_eos():
    E = pc.EOS
    tokens = torch.tensor([[5, 6, E, 7, E, 8], [5, 6, 7, 8, 9, 5], [E, E, E, 5, 5, 5], [5, 5, 5, 5, 5, E]])
    assert pc.completion_mask(tokens).tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0], [1] * 6]


@pytest.mark.parametrize("N", [1, 3])
def test_after_eos_there_are_pads_and_they_are_not_counted(small, N):
    args, _, model, prompts, left = a_batch(small, "--n_predict", str(N), n=32)
    model.lm_head.bias.data[pc.EOS] += 3.0          # end often
    torch.manual_seed(0)
    ids, _, mask = pc.rollout(model, prompts, left, args.max_new)
    assert 0.2 < mask.float().mean() < 0.9
    for row, m in zip(ids[:, 5:].tolist(), mask.tolist()):
        n = row.index(pc.EOS) + 1 if pc.EOS in row else len(row)
        assert m == [i < n for i in range(7)] and row[n:] == [pc.PAD] * (7 - n)


# ---- the idea ----------------------------------------------------------------------------------------------------------------

def test_gae_literally():
    """gamma 0.5, lambda 0.5: delta = [1 + .5*2 - 1, 0 + .5*4 - 2, 3 - 4] = [1, 0, -1]; A = [1 + .25*(-.25), -.25, -1]."""
    adv, ret = pc.gae(torch.tensor([[1.0, 0, 3, 9]]), torch.tensor([[1.0, 2, 4, 9]]), torch.tensor([[1, 1, 1, 0]]), 0.5, 0.5)
    assert adv.tolist() == [[0.9375, -0.25, -1.0, 0.0]] and ret.tolist() == [[1.9375, 1.75, 3.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_gae_against_its_definition_row_by_row(lengths, gamma, lam, seed):
    g = torch.Generator().manual_seed(seed)
    r, v = torch.randn(len(lengths), 6, generator=g), torch.randn(len(lengths), 6, generator=g)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    adv, ret = pc.gae(r * mask, v, mask, gamma, lam)
    for b, n in enumerate(lengths):
        delta = [r[b, t] + (gamma * v[b, t + 1] if t + 1 < n else 0) - v[b, t] for t in range(n)]
        for t in range(n):
            want = sum((gamma * lam)**l * delta[t + l] for l in range(n - t))
            assert adv[b, t].item() == pytest.approx(want.item(), abs=1e-5) and ret[b, t].item() == pytest.approx((want + v[b, t]).item(), abs=1e-5)
        assert not adv[b, n:].any() and not ret[b, n:].any()
    if gamma == lam == 1:
        assert torch.allclose(ret, ((r * mask).flip(1).cumsum(1).flip(1)) * mask, atol=1e-5)


def test_group_advantages_literally():
    r = torch.tensor([0.0, 1, 2, 5, 5, 5])
    assert torch.allclose(pc.group_advantages(r, 3, "grpo"), torch.tensor([-1.0, 0, 1, 0, 0, 0]), atol=1e-3)
    assert pc.group_advantages(r, 3, "dr_grpo").tolist() == [-1, 0, 1, 0, 0, 0]
    assert pc.group_advantages(r, 3, "rloo").tolist() == [-1.5, 0, 1.5, 0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_rewards_are_compared_within_their_group_and_not_over_the_array(G, n, seed):
    r = torch.randn(n, G, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for algo in ("grpo", "dr_grpo", "rloo"):
        a = pc.group_advantages(r.flatten(), G, algo).view(n, G)
        assert a.sum(1).abs().max() < 1e-9
        moved = r.clone()
        moved[0] += 100                             # another group's level is none of this one's business, nor is its own
        assert torch.allclose(pc.group_advantages(moved.flatten(), G, algo).view(n, G), a, atol=1e-9)
        for b in range(n):
            for i in range(G):
                want = dict(grpo=(r[b, i] - r[b].mean()) / (r[b].std() + 1e-4), dr_grpo=r[b, i] - r[b].mean(),
                            rloo=r[b, i] - (r[b].sum() - r[b, i]) / (G - 1))[algo]
                assert a[b, i].item() == pytest.approx(want.item(), abs=1e-9)


def test_whiten_and_averages_see_only_what_is_there():
    x, mask = torch.tensor([[1.0, 3, 99], [5, 7, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    w = pc.whiten(x, mask)
    real = x[mask.bool()]
    assert torch.allclose(w[mask.bool()], (real - real.mean()) / real.std(unbiased=False), atol=1e-5) and w[0, 2] == 0
    assert pc.average(x, mask, "ppo").item() == 5.0                                 # 25 / 5
    assert pc.average(x, mask, "grpo").item() == 4.5                                # (2 + 7) / 2
    assert pc.average(x, mask, "rloo").item() == pc.average(x, mask, "dr_grpo").item() == pytest.approx(25 / 6)


def test_the_clipped_losses_literally():
    old, new = torch.zeros(4), torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    assert torch.allclose(pc.policy_loss(new, old, torch.tensor([1.0, -1, 1, -1]), 0.2), torch.tensor([-1.2, 1.5, -0.5, 0.8]))
    value, before, returns = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.9]), torch.tensor([1.0, 0.0])
    assert torch.allclose(pc.value_loss(value, before, returns, 0.2), torch.tensor([0.5 * 0.8**2, 0.5]))
    r = torch.tensor([2.0]), torch.tensor([0.5])
    assert pc.ranking_loss(*r, 1.0).item() == pytest.approx(math.log(1 + math.exp(-0.5)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999))
def test_the_gradient_of_the_clipped_losses_against_finite_differences(seed):
    g = torch.Generator().manual_seed(seed)
    old, adv, logp = (torch.randn(5, generator=g, dtype=torch.float64) * s for s in (1.0, 1.0, 0.3))
    logp, mask = (logp + old).requires_grad_(), torch.tensor([1, 1, 1, 1, 0])
    for f in (lambda x: pc.average(pc.policy_loss(x[None], old[None], adv[None], 0.2), mask[None], "ppo"),
              lambda x: pc.average(pc.value_loss(x[None], old[None], adv[None], 0.2), mask[None], "grpo"),
              lambda x: pc.average(pc.kl_k3(x[None], old[None]), mask[None], "dr_grpo")):
        (grad,) = torch.autograd.grad(f(logp), logp)
        for i in range(5):
            h = torch.zeros(5, dtype=torch.float64)
            h[i] = 1e-6
            assert grad[i].item() == pytest.approx(((f(logp + h) - f(logp - h)) / 2e-6).item(), abs=1e-5)
        assert grad[4] == 0


def test_kl_is_never_negative_and_right_on_two_known_distributions():
    for p, q in (([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]), ([0.25, 0.75], [0.5, 0.5])):
        p, q = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
        k3 = pc.kl_k3(p.log(), q.log())
        assert (k3 >= 0).all() and (p * k3).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)
    x = torch.randn(10000, 2)
    assert (pc.kl_k3(x[:, 0], x[:, 1]) >= -1e-6).all() and pc.kl_k3(x[:, 0], x[:, 0]).abs().max() == 0


def test_noise_is_part_of_the_policy():
    p = pc.policy_logp(torch.zeros(8), 1.0, 0.5).exp()
    assert p[[pc.PAD, pc.BOS, pc.UNK]].sum() < 1e-6 and torch.allclose(p[[2, 4, 5, 6, 7]], torch.tensor(0.2), atol=1e-6)
    p = pc.policy_logp(torch.tensor([9.0, 9, 0, 9, 50, 0, 0, 0]), 1.0, 0.5).exp()
    assert torch.allclose(p[[2, 4]], torch.tensor([0.1, 0.6]), atol=1e-6)


# ---- rewards -------------------------------------------------------------------------------------------------------------------

def rule(reward, R, **kw):
    args = pc.get_args(["--reward", reward, "--max_new", str(R)] + [x for k, v in kw.items() for x in (f"--{k}", v)])
    return pc.Rule(args, TOY)


TOY = pc.Tokenizer(["b c cab x d x", "cab"], 4 + 7 + 1)         # b, c, a, x, d, space and the word cab, which counts twice


@pytest.mark.parametrize("reward,kw", [("pattern", {}), ("pattern", dict(pattern="b cb")), ("pattern", dict(pattern="cc")), ("white_more", {}),
                                       ("white_less", {}), ("letters", dict(letters="xd")), ("length", {})])
def test_the_attainable_maximum_is_what_brute_force_finds(reward, kw):
    R = 4
    r, V = rule(reward, R, **kw), len(TOY.tokens)
    every = torch.tensor(list(itertools.product([v for v in range(V) if v not in (pc.PAD, pc.BOS, pc.UNK)], repeat=R)))
    mask = pc.completion_mask(every)
    score = r(torch.cat([torch.full((len(every), 2), 5), every], 1), None, mask)
    best = pc.final(score, mask)
    assert best.max().item() == pytest.approx(1.0, abs=1e-6) and best.min() >= 0
    rng = np.random.default_rng(0)
    for i in rng.integers(0, len(every), 300).tolist():
        tokens = [v for v, m in zip(every[i].tolist(), mask[i].tolist()) if m]
        words = [TOY.tokens[v] for v in tokens if v != pc.EOS]
        want = dict(pattern=TOY.decode(tokens).count(kw.get("pattern", "b c")) / r.maximum, white_more=sum(w == " " for w in words) / R,
                    white_less=sum(w != " " for w in words) / R, letters=sum(set(w) <= set("xd") for w in words) / R,
                    length=(1 - abs(len(words) - 2) / 2) * (pc.EOS in tokens))[reward]
        assert best[i].item() == pytest.approx(want, abs=1e-6), (tokens, reward)


def test_each_tokens_reward_is_what_it_adds_and_nothing_is_lost(small, tmp_path):
    """The score of every prefix is the score of that prefix as a text of its own."""
    r = rule("pattern", 6)
    ids = torch.tensor([[5] * 2 + TOY.encode("b cb c")])
    mask = torch.ones(1, 6, dtype=torch.bool)
    assert (r(ids, None, mask) * r.maximum)[0].tolist() == pytest.approx([0, 0, 1, 1, 1, 2])


def test_a_reward_nobody_can_earn_is_one_sentence(capsys):
    for kw in (dict(pattern="b q"), dict(pattern="bcbcbcbcbc")):
        with pytest.raises(SystemExit):
            rule("pattern", 4, **kw)
    with pytest.raises(SystemExit):
        rule("letters", 4, letters="q")
    assert capsys.readouterr().err.count("\n") == 3


# ---- beam search ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("N", [1, 2])
def test_beam_of_1_is_greedy_and_a_wide_one_is_brute_force(small, N):
    args = small("--n_predict", str(N), "--max_new", "4", "--prompt_len", "3")
    model, R, V = a_model(args, 9), 4, 9
    prompt, left = torch.tensor([pc.PAD, pc.BOS, 6]), torch.tensor([1])
    with torch.no_grad():
        every = torch.tensor(list(itertools.product(range(V), repeat=R)))
        every = every[~torch.isin(every, torch.tensor([pc.BOS, pc.UNK])).any(1)]
        mask = pc.completion_mask(every)
        every = every[((every == pc.PAD) == ~mask).all(1)]                              # each text once: PAD after EOS and only there
        mask = pc.completion_mask(every)
        ids = torch.cat([prompt.expand(len(every), -1), every], 1)
        total = (pc.replay(model, ids, left.expand(len(ids)), R)[0] * mask).sum(1)
        assert pc.beam(model, prompt, left, R, 2000).tolist() == ids[total.argmax()].tolist()
        assert torch.logsumexp(total, 0).item() == pytest.approx(0, abs=1e-4)           # and all texts together have probability 1
        greedy, row = [], torch.cat([prompt, torch.full((R,), 4)])[None]
        for t in range(R):
            greedy.append(pc.replay(model, row, left, R)[1][0, t].argmax().item())
            row[0, 3 + t] = greedy[-1]
            if greedy[-1] == pc.EOS:
                break
        assert pc.beam(model, prompt, left, R, 1).tolist() == prompt.tolist() + greedy + [pc.PAD] * (R - len(greedy))


# ---- learning ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("algo", ["ppo", "grpo", "dr_grpo", "rloo", "rejection"])
def test_every_algorithm_climbs(small, tmp_path, algo):
    args = small("--algo", algo, "--reward", "white_less", "--iterations", "25", "--prompts", "8", "--rl_lr", "0.003", "--kl", "0")
    corpus = pc.Corpus(args)
    torch.manual_seed(0)
    model = pc.Transformer(len(corpus.tok.tokens), 12, args)
    model.lm_head.bias.data[[pc.EOS, corpus.tok.encode(" ")[0]]] = 3.0                  # begins with spaces and ends
    start = copy.deepcopy(model).requires_grad_(False)
    curve = pc.improve("test", algo, model, start, pc.Rule(args, corpus.tok), corpus.train, args, tmp_path / "x.pt")["curve"]
    assert curve[0][1] < 0.35 and np.mean([row[1] for row in curve[-3:]]) > curve[0][1] + 0.25


@pytest.mark.parametrize("flags", [["--kl_in", "loss"], ["--kl_in", "reward"], ["--kl_in", "reward", "--algo", "rloo"]])
def test_the_kl_weight_keeps_the_policy_near(small, tmp_path, flags):
    kl = []
    for weight in ("0", "1"):
        args = small("--reward", "white_less", "--iterations", "15", "--rl_lr", "0.003", "--kl", weight, "--kl_end", weight, *flags)
        corpus = pc.Corpus(args)
        torch.manual_seed(0)
        model = pc.Transformer(len(corpus.tok.tokens), 12, args)
        model.lm_head.bias.data[[pc.EOS, corpus.tok.encode(" ")[0]]] = 3.0
        start = copy.deepcopy(model).requires_grad_(False)
        kl.append(pc.improve("t", args.algo, model, start, pc.Rule(args, corpus.tok), corpus.train, args, tmp_path / f"{weight}.pt")["curve"][-1][2])
    assert kl[1] < kl[0] / 2


def test_the_kl_weight_holds_and_then_lets_go():
    weight = lambda done, *flags: pc.kl_weight(pc.get_args(["--kl", "0.3", *flags]), done)
    assert [weight(d) for d in (0.0, 0.5, 2 / 3, 5 / 6, 1.0)] == pytest.approx([0.3, 0.3, 0.3, 0.15, 0.0])
    assert [weight(d, "--kl_end", "0.3") for d in (0.0, 0.9, 1.0)] == pytest.approx([0.3] * 3) and weight(1.0, "--kl_end", "0.5") == pytest.approx(0.5)
    get = lambda *flags: (lambda a: (a.kl, a.kl_end, a.normalize))(pc.get_args([*flags]))
    assert get() == get("--algo", "rloo") == (0.002, 0.0, "none") and get("--algo", "grpo") == (0.02, 0.0, "none")
    assert get("--algo", "rlhf") == (0.002, 0.002, "advantages") and get("--algo", "grpo", "--kl", "0.1") == (0.1, 0.0, "none")


@pytest.mark.parametrize("algo", ["ppo", "rloo"])
def test_the_update_takes_the_kl_weight_of_its_round(algo, small, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pc, "kl_weight", lambda args, done: asked.append(done) or (0.0 if len(asked) < 3 else math.inf))
    args = small("--algo", algo, "--iterations", "3")
    corpus = pc.Corpus(args)
    model = a_model(args, len(corpus.tok.tokens))
    with pytest.raises(SystemExit):                 # an infinite weight: no finite loss in the third round, and only there
        pc.improve("t", algo, model, copy.deepcopy(model).requires_grad_(False), pc.Rule(args, corpus.tok), corpus.train, args, tmp_path / "x.pt")
    assert asked == [0.0, 0.5, 1.0]


def test_rejection_samples_with_noise_and_takes_longer_unless_told_otherwise():
    get = lambda *flags: (lambda a: (a.iterations, a.epsilon))(pc.get_args([*flags]))
    assert get("--algo", "rejection") == get("--algo=rejection") == (300, 0.1) and get() == get("--algo", "grpo") == (150, 0.0)
    assert get("--algo", "rejection", "--iterations", "7", "--epsilon", "0") == (7, 0.0) and get("--algo", "rejection", "--smoke")[0] == 4


def test_rejection_keeps_the_winners_of_all_rounds(small, tmp_path):
    args = small("--algo", "rejection", "--reward", "letters", "--epochs", "1", "--rl_lr", "1e-9", "--epsilon", "0")
    corpus = pc.Corpus(args)
    model = a_model(args, len(corpus.tok.tokens))
    reward, start = pc.Rule(args, corpus.tok), copy.deepcopy(model).requires_grad_(False)
    pool = pc.improve("t", "rejection", model, start, reward, corpus.train, args, tmp_path / "x.pt")["pool"]
    won = {}
    for step in range(args.iterations):             # the policy hardly moves, so its rounds can be drawn again
        torch.manual_seed(1_000_003 * args.seed + step)
        prompts, left, _ = pc.draw_prompts(corpus.train, 4, 4, args, np.random.default_rng((args.seed, 1, step)))
        ids, _, mask = pc.rollout(start, prompts, left, args.max_new)
        score = pc.final(reward(ids, left, mask), mask)
        for b in range(0, 16, 4):
            i = b + score[b:b + 4].argmax().item()
            won[tuple(ids[i].tolist())] = pytest.approx(score[i].item())
    assert pool == won and list(pool.values()) == sorted(pool.values())


# ---- Llama 2's recipe ------------------------------------------------------------------------------------------------------------

def test_the_judge_and_its_pairs(small):
    args, corpus, model, _, _ = a_batch(small)
    enc = lambda text: corpus.tok.encode(text)
    assert pc.judge(enc("the cat and dog") + [pc.EOS], corpus) == 4 / 8
    assert pc.judge(enc("the cat and dog"), corpus) == 0 and pc.judge(enc("cat cat cat zz") + [pc.EOS], corpus) == 1 / 8
    model.lm_head.bias.data[[pc.EOS, enc(" ")[0]]] += 4.0
    torch.manual_seed(0)
    ids, left, margin = pc.ask_judge(model, corpus, 200, args, np.random.default_rng(0))
    assert 0 < len(ids) < 200
    for (a, b), m in zip(ids[:, :, 5:].tolist(), margin.tolist()):
        gap = pc.judge(a, corpus) - pc.judge(b, corpus)
        assert gap > 0 and m == pytest.approx(sum(gap > x for x in (0.2, 0.4, 0.6)) / 3)


def test_a_reward_model_scores_the_last_real_token(small):
    args, corpus, model, prompts, left = a_batch(small)
    torch.manual_seed(0)
    ids, _, mask = pc.rollout(model, prompts, left, args.max_new)
    got = pc.rate(model, ids, left, args.max_new)
    for i in range(len(ids)):
        n = 5 + int(mask[i].sum())
        assert got[i].item() == pytest.approx(model.value(model(ids[i:i + 1, :n], left[i:i + 1]))[0, -1].item(), abs=1e-4)
    assert torch.allclose(pc.final(pc.learned(model, got.mean(), ids, left, mask), mask), torch.sigmoid(got - got.mean()), atol=1e-5)


# ---- the command -------------------------------------------------------------------------------------------------------------------

TINY = ["--smoke", "--steps", "6", "--iterations", "2", "--n_layer", "1"]


@pytest.mark.parametrize("flags", [["--reward", "white_more", "--value", "separate", "--n_predict", "2"], ["--algo", "rlhf"]])
def test_smoke_alone_in_an_empty_folder(alone, flags):
    r = alone("ppo_char.py", *TINY, *flags, files=ALONE)
    assert r.returncode == 0 and "Traceback" not in r.stderr, r.stderr
    row = json.loads((alone.folder / "out/results.jsonl").read_text().splitlines()[-1])
    assert (alone.folder / row["metrics"]["figure"]).read_bytes()[:4] == b"\x89PNG"
    assert r.stdout.splitlines()[-1].startswith("result ppo_char.py:") and not list(alone.folder.rglob("*.part*"))
    assert 0 <= row["metrics"]["reward"] <= 1 and row["metrics"].get("ratio_error", 0) < 1e-5


def test_each_version_of_rlhf_samples_for_prompts_of_its_own(tmp_path, monkeypatch):
    """And two corpora of the same bytes, cut up otherwise, are two models."""
    drawn, draw, improve = [], pc.draw_prompts, pc.improve

    def note(name, *rest):
        monkeypatch.setattr(pc, "draw_prompts", lambda *a, **kw: drawn.append((name, (got := draw(*a, **kw))[0].tolist())) or got)
        try:
            return improve(name, *rest)
        finally:
            monkeypatch.setattr(pc, "draw_prompts", draw)
    monkeypatch.setattr(pc, "improve", note)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_char.py", *TINY, "--algo", "rlhf"])
    pc.main()
    first = {name: prompts for name, prompts in reversed(drawn)}           # of each version; another is for a look at its beams
    assert set(first) == {f"RLHF-V{v}" for v in range(1, 6)} and len(set(map(str, first.values()))) == 5
    made = {p.name for p in tmp_path.glob("out/*base*.pt")}
    texts = b"".join((pc.DATA / f"{x}.txt").read_bytes() for x in ("quotes", "patterns"))
    (tmp_path / "all.txt").write_bytes(texts)
    monkeypatch.setattr(sys, "argv", ["ppo_char.py", *TINY, "--corpus", "all.txt"])
    pc.main()
    assert len({p.name for p in tmp_path.glob("out/*base*.pt")} - made) == 1


def faulty(capsys, monkeypatch, tmp_path, *flags):
    """The command in this process: exit status 2 and one sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_char.py", *TINY, *map(str, flags)])
    with pytest.raises(SystemExit) as e:
        common.run(pc.main)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.strip() and "\r" not in x and "it/s" not in x]
    assert e.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("flags", [["--algo", "dpo"], ["--steps", "0"], ["--clip", "nan"], ["--max_new", "1"], ["--group", "1"], ["--n_head", "3"], ["--temperature", "0"],
                                   ["--epsilon", "1.5"], ["--kl", "-1"], ["--vocab_size", "9"], ["--nonsense"], ["--seed", "-1"], ["--pattern", "\u2603"],
                                   ["--pattern", ""], ["--letters", "", "--reward", "letters"], ["--algo", "rlhf", "--reward", "white_more"]])
def test_a_users_mistake_is_one_sentence(capsys, monkeypatch, tmp_path, flags):
    faulty(capsys, monkeypatch, tmp_path, *flags)


@pytest.mark.parametrize("content", [b"", b"one line\n", b"\0\1\2" * 100, "caf\xe9\n".encode("latin-1") * 50, None])
def test_an_empty_binary_or_missing_corpus_is_one_sentence(capsys, monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "c.txt").write_bytes(content)
    assert "c.txt" in faulty(capsys, monkeypatch, tmp_path, "--corpus", tmp_path / "c.txt")


def test_a_loss_that_is_not_finite_stops_with_the_step(small, tmp_path, capsys):
    args, corpus, model, _, _ = a_batch(small, "--iterations", "5")
    start, reward = copy.deepcopy(model).requires_grad_(False), pc.Rule(args, corpus.tok)

    def bad(ids, left, mask):
        bad.calls += 1
        return reward(ids, left, mask) * (math.nan if bad.calls > 4 else 1)     # the first two rounds' rewards and beams are right
    bad.calls = 0
    with pytest.raises(SystemExit):
        pc.improve("test", "ppo", model, start, bad, corpus.train, args, tmp_path / "x.pt")
    assert "not finite at round" in capsys.readouterr().err


def test_a_broken_checkpoint_is_one_sentence(capsys, monkeypatch, tmp_path):
    (tmp_path / "c.txt").write_text("\n".join(LINES))
    monkeypatch.chdir(tmp_path)
    flags = ["--corpus", str(tmp_path / "c.txt"), "--vocab_size", "60"]
    monkeypatch.setattr(sys, "argv", ["ppo_char.py", *TINY, *flags, "--reward", "model", "--algo", "grpo"])
    pc.main()
    monkeypatch.setattr(sys, "argv", ["ppo_char.py", *TINY, *flags])
    pc.main()
    (path,) = tmp_path.glob("out/*ppo_????????.pt")
    good = path.read_bytes()
    path.write_bytes(good[:len(good) // 2])
    assert path.name in faulty(capsys, monkeypatch, tmp_path, *flags)
    torch.save(dict(policy={}, critic={}, optimizer={}), path)
    assert "shape" in faulty(capsys, monkeypatch, tmp_path, *flags)


@pytest.mark.parametrize("algo", ["rejection", "grpo"])
def test_stopped_in_any_round_it_goes_on_to_the_same_numbers(small, tmp_path, monkeypatch, algo):
    args = small("--algo", algo, "--reward", "letters", "--iterations", "5")
    corpus = pc.Corpus(args)
    start, reward, states = a_model(args, len(corpus.tok.tokens)).requires_grad_(False), pc.Rule(args, corpus.tok), []
    monkeypatch.setattr(pc, "SAVE_EVERY", 2)

    def stops(ids, left, mask):
        stops.calls += 1
        if stops.calls == 6:                        # after the first checkpoint
            raise KeyboardInterrupt
        return reward(ids, left, mask)
    stops.calls = 0
    for name, rewards in (("whole", [reward]), ("stopped", [stops, reward])):
        for r in rewards:
            policy = copy.deepcopy(start).requires_grad_(True)
            try:
                state = pc.improve("t", algo, policy, start, r, corpus.train, args, tmp_path / f"{name}.pt")
            except KeyboardInterrupt:
                assert pc.common.resume(tmp_path / "stopped.pt")["step"] == 2
        states.append((str(state["curve"]), list(state["pool"].items()), [p.tolist() for p in policy.parameters()]))
    assert states[0] == states[1]


@pytest.mark.parametrize("algo", ["ppo"])
def test_killed_it_ends_with_the_same_curve(tmp_path, algo):
    (tmp_path / "c.txt").write_text("\n".join(LINES))
    flags = ["--smoke", "--corpus", str(tmp_path / "c.txt"), "--vocab_size", "60", "--steps", "6", "--iterations", "30", "--algo", algo,
             "--reward", "letters", "--value", "separate"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ppo_char as p; sys.argv[0] = 'ppo_char.py'; p.SAVE_EVERY = 5; p.common.run(p.main)"
    cmd, curves = [sys.executable, "-c", code, *flags], []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        if name == "killed":
            p = subprocess.Popen(cmd, cwd=tmp_path / name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            end = time.time() + 60
            while not list((tmp_path / name).glob(f"out/ppo_char_{algo}_*.pt")) and p.poll() is None and time.time() < end:
                time.sleep(0.002)
            assert p.poll() is None, "it ended before it was killed"
            p.send_signal(signal.SIGKILL)
            p.wait()
        r = subprocess.run(cmd, cwd=tmp_path / name, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        (path,) = (tmp_path / name).glob(f"out/ppo_char_{algo}_*.pt")
        curves.append(torch.load(path, weights_only=True))
    a, b = curves
    assert len(a["curve"]) == 30 and str(a["curve"]) == str(b["curve"]) and a["pool"] == b["pool"]
    for k in a["policy"]:
        assert torch.equal(a["policy"][k], b["policy"][k]), k
