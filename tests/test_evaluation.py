"""How good a model is: ranks, pooling, files to measure on, and the figures of models and batches."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import demo_tokenizer
from torch import nn

import secateur
from secateur import EvaluationReport, Figure, Pooling, RecipeError, StatisticsError, evaluate
from secateur.evaluation import (
    MAX_SENTENCES,
    METRICS,
    POOLING_MODES,
    DataFile,
    Inputs,
    KeptTensors,
    Reading,
    figures_of,
    measure,
    perplexity,
    ranks,
    read_data,
    run_dense,
    spearman,
)

# Ranks

SERIES = st.lists(st.tuples(st.integers(-4, 4), st.floats(-2, 2)), min_size=2, max_size=40)


@given(SERIES)
@settings(max_examples=50, deadline=None)
def test_ranks_count_what_is_smaller_and_half_of_what_is_equal(series):
    values = [value for value, _ in series]
    slow = [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]
    assert ranks(torch.tensor(values)).tolist() == slow


@given(SERIES)
@settings(max_examples=50, deadline=None)
def test_spearman_is_that_of_scipy(series):
    stats = pytest.importorskip("scipy.stats")
    first, second = (torch.tensor(values, dtype=torch.float64) for values in zip(*series, strict=True))
    found = spearman(first, second)
    if len(first.unique()) < 2 or len(second.unique()) < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


def test_equal_orders_give_exactly_one():
    for seed in range(20):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        assert spearman(x, 2 * x + 1) == 1.0
        assert spearman(x, -x) == -1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_rank(value):
    assert math.isnan(spearman(torch.tensor([1.0, 2.0, value]), torch.arange(3.0)))


# Pooling

STATES = torch.tensor([[[1.0, -4.0], [3.0, -8.0], [5.0, 0.0], [math.nan, math.inf]]])
REAL = torch.tensor([[True, True, True, False]])
POOLED = {
    "cls": [1.0, -4.0],
    "max": [5.0, 0.0],
    "mean": [3.0, -4.0],
    "mean_sqrt_len_tokens": [9 / 3**0.5, -12 / 3**0.5],
    "weightedmean": [22 / 6, -20 / 6],
    "lasttoken": [5.0, 0.0],
}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_padding_never_counts_on_either_side(mode, left):
    states, real = (STATES.roll(1, 1), REAL.roll(1, 1)) if left else (STATES, REAL)
    expected = torch.tensor([POOLED[mode]])
    torch.testing.assert_close(Pooling(mode, normalize=False)(states, real), expected)
    torch.testing.assert_close(Pooling(mode, normalize=False)(states[:, real[0]]), expected)
    torch.testing.assert_close(Pooling(mode)(states, real.long()), nn.functional.normalize(expected))
    assert not Pooling(mode)(states, real & False).any()


def test_several_modes_stand_one_after_the_other_and_half_precision_is_widened():
    states = torch.randn(2, 5, 3, dtype=torch.bfloat16)
    both = Pooling(("mean", "cls"), normalize=False)(states)
    assert both.dtype == torch.float32
    torch.testing.assert_close(both, torch.cat([states.float().mean(1), states[:, 0].float()], dim=1))


@pytest.mark.slow  # importing the library takes seconds
@pytest.mark.filterwarnings("ignore:Importing from:DeprecationWarning")
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling_is_that_of_sentence_transformers(mode):
    library = pytest.importorskip("sentence_transformers.models")
    states, real = torch.randn(3, 6, 4), torch.arange(6) < torch.tensor([[6], [2], [4]])
    theirs = library.Pooling(4, pooling_mode=mode)({"token_embeddings": states, "attention_mask": real.long()})
    torch.testing.assert_close(Pooling(mode, normalize=False)(states, real), theirs["sentence_embedding"])


def test_mistakes_of_pooling():
    with pytest.raises(RecipeError, match="unknown pooling mode 'men'; did you mean 'mean'"):
        Pooling(("men",))
    with pytest.raises(RecipeError, match="at least one mode"):
        Pooling(())
    with pytest.raises(TypeError, match="normalize"):
        Pooling(normalize=1)
    for states, mask in ((torch.ones(2, 3), None), (torch.ones(2, 3, 4), torch.ones(2, 4))):
        with pytest.raises(StatisticsError, match="cannot be pooled"):
            Pooling()(states, mask)


# Files

PAIRS = [("a cat", "a dog", 0.75), ("a cat", "a car, red", 0.25), ("this thing", "the other", -1.0)]
LABELS = [("some text", 1), ("another\ntext", 0)]


def as_json_lines(fields, rows):
    return "\n".join(json.dumps(dict(zip(fields, row, strict=True))) for row in rows)


def as_csv(fields, rows):
    quoted = [[f'"{cell}"' if isinstance(cell, str) else str(cell) for cell in row] for row in rows]
    return "\r\n".join(",".join(row) for row in [list(fields), *quoted]) + "\r\n"


@pytest.mark.parametrize(("suffix", "write"), [("jsonl", as_json_lines), ("json", as_json_lines), ("csv", as_csv)])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_fields_say_what_a_file_is_for(tmp_path, suffix, write, mark):
    path = tmp_path / f"data.{suffix}"
    path.write_text(mark + write(("sentence1", "sentence2", "score"), PAIRS), encoding="utf-8")
    pairs = read_data(path)
    assert (pairs.kind, pairs.texts, pairs.others, pairs.scores) == ("pairs", *zip(*PAIRS, strict=True))
    path.write_text(mark + write(("text", "label"), LABELS), encoding="utf-8")
    labels = read_data(str(path))
    assert (labels.kind, labels.texts) == ("labels", ("some text", "another\ntext"))
    assert labels.labels == (("1", "0") if suffix == "csv" else (1, 0))  # CSV has no numbers: the model's names decide
    path.write_text(mark + write(("id", "text"), [("x", "one"), ("y", "two")]), encoding="utf-8")
    assert (read_data(path).kind, read_data(path).text) == ("text", "one\n\ntwo")


def test_other_files_are_plain_text(tmp_path):
    path = tmp_path / "data.csv.txt"
    path.write_text("text,label\nsome,1\n")
    assert read_data(path) == DataFile(path, "text", "text,label\nsome,1\n")


def test_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('text,label\n"two\nlines",1\n\nx,2\n')
    assert read_data(path).lines == (2, 5)
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"text": "a", "label": 1}\n\n{"text": "b", "label": 0}')
    assert read_data(path).lines == (2, 4)


WRONG_JSON = {
    "not JSON": ('{"text": "a"}\n{"text"', "line 2: not JSON"),
    "no object": ('{"text": "a"}\n[1]', "line 2: expected an object with the fields .*, got a list"),
    "a field missing": (
        '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a", "score": 2}',
        "line 2: sentence2 missing; the fields are 'sentence1', 'score'",
    ),
    "the first without a label": ('{"text": "a"}\n{"text": "a", "label": 1}', "line 1: label missing"),
    "no text beside the labels": ('{"label": 1}', "line 1: text missing"),
    "null": ('{"text": "a", "label": null}', "line 1: label missing"),
    "a name nearly right": ('{"text": "a", "lable": 1}', "line 1: unknown field 'lable'; did you mean 'label'"),
    "another name nearly right": (
        '{"sentence_1": "a", "sentence2": "b", "score": 1}',
        "line 1: unknown field 'sentence_1'; did you mean 'sentence1'",
    ),
    "unknown fields": ('{"a": 1, "b": 2}', "line 1: the fields are 'a', 'b'; expected text; text and label"),
    "two kinds": ('{"text": "a", "label": 1, "score": 2}', "fields of two kinds"),
    "a score that is text": (
        '{"sentence1": "a", "sentence2": "b", "score": "high"}',
        "line 1: score should be a finite number, got 'high'",
    ),
    "a score that is no number": ('{"sentence1": "a", "sentence2": "b", "score": NaN}', "line 1: score should be"),
    "a score that is true": ('{"sentence1": "a", "sentence2": "b", "score": true}', "line 1: score should be"),
    "one score": ('{"sentence1": "a", "sentence2": "b", "score": 1}', "the score 1 in all 1 lines"),
    "a number for a text": ('{"text": 1, "label": 1}', "line 1: text should be text that is not empty, got 1"),
    "a sentence that is empty": (
        '{"sentence1": " ", "sentence2": "b", "score": 1}\n{"sentence1": "a", "sentence2": "b", "score": 2}',
        "line 1: sentence1 should be text",
    ),
    "a label that is a fraction": ('{"text": "a", "label": 0.5}', "line 1: label should be the number of a class"),
    "half of a character": ('{"text": "\\ud800"}', "line 1: text has half of a surrogate pair"),
    "nothing": ("\n\n", "no entries"),
    "no text": ('{"text": " "}', "holds no text"),
}
WRONG_CSV = {
    "a field too many": ("text,label\na,1\nb,c,2\n", r"line 3: 3 fields, but the header has 2 \(text, label\)"),
    "a field twice": ("text,text\na,b\n", "line 1: the header has a field twice"),
    "an open quote": ('text,label\n"a,1\n', "line 2: not CSV"),
    "semicolons": ("text;label\na;1\n", "line 2: the fields are 'text;label'|line 2: unknown field 'text;label'"),
    "only a header": ("text,label\n", "no entries"),
}


@pytest.mark.parametrize("case", WRONG_JSON)
def test_a_wrong_line_of_json_is_named(tmp_path, case):
    content, message = WRONG_JSON[case]
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(StatisticsError, match=message) as caught:
        read_data(tmp_path / "data.jsonl")
    assert str(caught.value).startswith(str(tmp_path / "data.jsonl"))


@pytest.mark.parametrize("case", WRONG_CSV)
def test_a_wrong_line_of_csv_is_named(tmp_path, case):
    content, message = WRONG_CSV[case]
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(StatisticsError, match=message):
        read_data(tmp_path / "data.csv")


KINDS = {
    ("text", True, False): ("perplexity",),
    ("text", True, True): ("perplexity",),
    ("text", False, True): ("similarity", "embedding_similarity", "rank"),
    ("text", False, False): "none to compare with",
    ("pairs", False, False): ("spearman",),
    ("pairs", False, True): ("spearman",),
    ("pairs", True, True): "an encoder of sentences",
    ("labels", False, False): ("accuracy",),
    ("labels", True, True): "a head for classification",
}


@pytest.mark.parametrize("case", KINDS)
def test_figures_follow_from_the_file_and_the_model(case):
    kind, causal, has_dense = case
    if isinstance(KINDS[case], tuple):
        assert figures_of(DataFile("x", kind), causal, has_dense) == KINDS[case]
        assert set(KINDS[case]) <= set(METRICS)
    else:
        with pytest.raises(RecipeError, match=KINDS[case]):
            figures_of(DataFile("x", kind), causal, has_dense)


# Models


SENTENCES = ["def read(path):", "with open(path) as file:", "a, b = 1, 2", "return file.read()", "x", "import os, sys"]


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


@pytest.fixture(scope="module")
def encoders():
    """A tiny encoder with a head for three classes, and one that is nearly the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    names = {0: "no", 1: "yes", 2: "7"}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, id2label=names)
    dense = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(8)
        model = transformers.BertForSequenceClassification(config).eval()
        model.load_state_dict(dense.state_dict())
        for parameter in model.bert.encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return dense, model


def embedded(model, tokenizer, text, pooling="mean"):
    """One sentence at a time, which has no padding."""
    with torch.no_grad():
        states = model.bert(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].double()
    return states.mean(0) if pooling == "mean" else states[0]


def cosine(first, second):
    return float(first @ second / (first.norm() * second.norm()))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_rank_agreement_and_embeddings_are_those_of_a_loop(tmp_path, tokenizer, encoders, pooling):
    stats = pytest.importorskip("scipy.stats")
    path = tmp_path / "text.txt"
    path.write_text("\n".join([*SENTENCES, SENTENCES[0]]))
    dense, model = encoders
    report = evaluate(model, path, None, dense, tokenizer=tokenizer, pooling=Pooling(pooling))
    rows = [[embedded(m, tokenizer, text, pooling) for text in SENTENCES] for m in (dense, model)]
    pairs = [(i, j) for i in range(len(SENTENCES)) for j in range(i)]
    cosines = [[cosine(found[i], found[j]) for i, j in pairs] for found in rows]
    assert report["rank"] == pytest.approx(100 * stats.spearmanr(*cosines).statistic, abs=1e-9)
    close = np.mean([cosine(*both) for both in zip(*rows, strict=True)])
    assert report["embedding_similarity"] == pytest.approx(close, abs=1e-5)
    assert report["rank"] < 99  # the models differ
    figure = report.figures[-1]
    assert (figure.metric, figure.dense, figure.count, figure.unit) == ("rank", 100.0, 6, "sentences")
    assert figure.difference == figure.value - 100
    assert "15 pairs" in figure.note
    assert [f.metric for f in report.figures] == list(figures_of(path, False, True))


def test_a_model_agrees_with_itself(tmp_path, tokenizer, encoders):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    report = evaluate(encoders[0], tmp_path / "text.txt", dense=encoders[0], tokenizer=tokenizer)
    assert report["rank"] == 100.0
    assert report["similarity"] == pytest.approx(1, abs=1e-6)
    assert report["embedding_similarity"] == pytest.approx(1, abs=1e-9)


def test_the_score_of_pairs_is_that_of_a_loop(tmp_path, tokenizer, encoders):
    stats = pytest.importorskip("scipy.stats")
    rows = [(SENTENCES[i], SENTENCES[j], (3 * i + 5 * j) % 7) for i in range(6) for j in range(i)]
    (tmp_path / "pairs.jsonl").write_text(as_json_lines(("sentence1", "sentence2", "score"), rows))
    report = evaluate(encoders[1], tmp_path / "pairs.jsonl", None, encoders[0], tokenizer=tokenizer)
    values = []
    for model in encoders:
        cosines = [cosine(*(embedded(model, tokenizer, text) for text in row[:2])) for row in rows]
        values.append(100 * stats.spearmanr(cosines, [row[2] for row in rows]).statistic)
    (figure,) = report.figures
    assert (figure.dense, figure.value) == pytest.approx(tuple(values), abs=1e-9)
    assert (figure.metric, figure.count, figure.unit) == ("spearman", 15, "pairs")
    assert evaluate(encoders[1], [tmp_path / "pairs.jsonl"], tokenizer=tokenizer).figures[0].dense is None


def test_accuracy_takes_numbers_and_names(tmp_path, tokenizer, encoders):
    model, config = encoders[0], encoders[0].config
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in SENTENCES]
        found = [int(model(input_ids=row).logits.argmax()) for row in ids]
    labels = [found[0], (found[1] + 1) % 3, config.id2label[found[2]], config.id2label[(found[3] + 1) % 3]]
    rows = list(zip(SENTENCES, labels, strict=False))
    (tmp_path / "labels.jsonl").write_text(as_json_lines(("text", "label"), rows))
    assert evaluate(model, tmp_path / "labels.jsonl", tokenizer=tokenizer)["accuracy"] == 0.5
    (tmp_path / "labels.csv").write_text(as_csv(("text", "label"), rows))
    assert evaluate(model, tmp_path / "labels.csv", tokenizer=tokenizer)["accuracy"] == 0.5
    # "7" is the name of class 2, and no number.
    (tmp_path / "labels.csv").write_text('text,label\n"a",7\n')
    evaluate(model, tmp_path / "labels.csv", tokenizer=tokenizer)
    for label in (3, -1, "maybe", 10**30, "10"):
        (tmp_path / "labels.jsonl").write_text(as_json_lines(("text", "label"), [*rows, ("x", label)]))
        with pytest.raises(StatisticsError, match=r"labels\.jsonl: line 5: label .* is no class of the model \(0 = no"):
            evaluate(model, tmp_path / "labels.jsonl", tokenizer=tokenizer)


def test_accuracy_needs_scores_of_classes(tmp_path, tokenizer, encoders):
    (tmp_path / "labels.csv").write_text("text,label\na,1\n")
    with pytest.raises(StatisticsError, match=r"accuracy needs the scores of two or more classes"):
        evaluate(encoders[0].bert, tmp_path / "labels.csv", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def test_text_gives_the_perplexity_of_a_language_model(tmp_path, tokenizer, language_model):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    report = evaluate(language_model, tmp_path / "text.txt", dense=language_model, tokenizer=tokenizer)
    ids = torch.tensor(tokenizer("\n".join(SENTENCES))["input_ids"])
    with torch.no_grad():
        losses = nn.functional.cross_entropy(language_model(ids[None]).logits[0, :-1], ids[1:])
    assert report["perplexity"] == pytest.approx(float(losses.exp()), rel=1e-5)
    assert report.figures[0].dense == report["perplexity"]
    assert report.figures[0].count == len(ids) - 1
    with pytest.raises(RecipeError, match="gives perplexity for this model, not rank"):
        evaluate(language_model, tmp_path / "text.txt", "rank", language_model, tokenizer=tokenizer)


def test_padding_is_neither_predicted_nor_predicted_from(language_model):
    ids = torch.randint(2048, (1, 7), generator=torch.Generator().manual_seed(0))
    expected = perplexity(language_model, [ids])
    padding = torch.zeros(1, 3, dtype=torch.long)
    padded = {"input_ids": torch.cat([ids, padding], 1), "attention_mask": torch.cat([ids > -1, padding > 0], 1)}
    found = perplexity(language_model, [padded])
    assert found == (pytest.approx(expected[0]), expected[1])
    assert evaluate(language_model, [padded])["perplexity"] == found[0]


def test_a_pooling_makes_a_language_model_an_encoder(tmp_path, tokenizer, language_model):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    pooling = Pooling("lasttoken")
    report = evaluate(
        language_model, tmp_path / "text.txt", "rank", language_model, tokenizer=tokenizer, pooling=pooling
    )
    assert report["rank"] == 100


def test_many_sentences_are_thinned_out_evenly(tmp_path, tokenizer, encoders):
    (tmp_path / "text.txt").write_text("\n".join(f"number {number}" for number in range(2 * MAX_SENTENCES + 1)))
    data = read_data(tmp_path / "text.txt")
    reading = Reading(tokenizer, 64, causal=False)
    inputs = Inputs.of(data, reading, True, ["embedding_similarity"])
    assert inputs.used == (MAX_SENTENCES, 2 * MAX_SENTENCES + 1)
    assert not inputs.windows  # nobody asked for what they give
    (figure,) = measure(inputs, encoders[1], run_dense(inputs, encoders[0])).figures
    assert figure.count == MAX_SENTENCES
    assert figure.note == "1,000 of 2,001 sentences, evenly spread"


def test_one_dense_run_serves_several_models_from_memory_and_disk(tmp_path, tokenizer, encoders, monkeypatch):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 20))
    inputs = Inputs.of(read_data(tmp_path / "text.txt"), Reading(tokenizer, 32, False), True)
    dense = run_dense(inputs, encoders[0])
    monkeypatch.setattr(KeptTensors.__init__, "__defaults__", (0,))
    from_disk = run_dense(inputs, encoders[0])
    found = [measure(inputs, model, outcome).figures for model in encoders for outcome in (dense, from_disk)]
    assert found[0] == found[1]
    assert found[2] == found[3] != found[0]


def test_outputs_of_another_width_are_not_compared_but_ranked(tmp_path, tokenizer, encoders, language_model):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    config = transformers.BertConfig(**{**encoders[0].bert.config.to_dict(), "hidden_size": 8})
    report = evaluate(
        transformers.BertModel(config).eval(), tmp_path / "text.txt", dense=encoders[0], tokenizer=tokenizer
    )
    assert [figure.metric for figure in report.figures] == ["rank"]
    assert len(report.notes) == 2
    assert re.search(r"no similarity: the dense model gives \[1, \d+, 16\], this one \[1, \d+, 8\]", report.notes[0])
    assert "no embedding similarity: the dense model gives [6, 16], this one [6, 8]" in report.notes[1]


def test_outputs_that_are_not_finite_give_no_number(tmp_path, tokenizer, encoders):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    transformers = pytest.importorskip("transformers")
    broken = transformers.BertModel(encoders[0].config).eval()
    nn.init.constant_(broken.encoder.layer[0].output.dense.weight, math.nan)
    report = evaluate(broken, tmp_path / "text.txt", dense=encoders[0], tokenizer=tokenizer)
    assert all(math.isnan(figure.value) for figure in report.figures)
    assert all("not a number" in figure.note for figure in report.figures)
    table = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert table["figures"][0]["value"] == "nan"
    assert math.isnan(EvaluationReport.from_json(report.to_json())["rank"])


def test_nothing_stays_on_the_model(tmp_path, tokenizer, encoders):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    encoders[1].train()
    before = {name: tensor.clone() for name, tensor in encoders[1].state_dict().items()}
    evaluate(encoders[1], tmp_path / "text.txt", dense=encoders[0], tokenizer=tokenizer)
    assert all(module.training for module in encoders[1].modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoders[1].parameters())
    torch.testing.assert_close(encoders[1].state_dict(), before, rtol=0, atol=0)
    encoders[1].eval()


def test_mistakes_with_files_are_named(tmp_path, tokenizer, encoders):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    text = tmp_path / "text.txt"
    with pytest.raises(RecipeError, match="Give tokenizer="):
        evaluate(encoders[0], text)
    with pytest.raises(RecipeError, match=r"plain text, .* none to compare with"):
        evaluate(encoders[0], text, tokenizer=tokenizer)
    with pytest.raises(RecipeError, match="unknown metric 'ranks'; did you mean 'rank'"):
        evaluate(encoders[0], text, "ranks", encoders[0], tokenizer=tokenizer)
    with pytest.raises(RecipeError, match="between 16 and the 64 tokens"):
        evaluate(encoders[0], text, dense=encoders[0], tokenizer=tokenizer, sequence_length=65)
    with pytest.raises(StatisticsError, match="cannot be read: No such file"):
        evaluate(encoders[0], tmp_path / "nowhere.txt", tokenizer=tokenizer)
    (tmp_path / "short.txt").write_text("only one sentence here")
    report = evaluate(encoders[0], tmp_path / "short.txt", dense=encoders[0], tokenizer=tokenizer)
    assert [figure.metric for figure in report.figures] == ["similarity", "embedding_similarity"]
    assert "no rank: it takes 3 different sentences, and the text has 1" in report.notes[0]
    small = Tokens(nn.Embedding(10, 4))
    with pytest.raises(StatisticsError, match=r"text\.txt: Tokens fails on a batch \[1, .*\] with ids up to"):
        evaluate(small, text, dense=small, tokenizer=tokenizer)


# Batches

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def classifiers():
    torch.manual_seed(2)
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model.load_state_dict(
        {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in dense.state_dict().items()}
    )
    return dense, model


def test_batches_of_any_model():
    stats = pytest.importorskip("scipy.stats")
    dense, model = classifiers()
    batches = [(X[:8], torch.arange(8) % 3), (X[8:], torch.arange(4) % 3)]
    labels = torch.cat([label for _, label in batches])
    report = evaluate(model, batches)
    assert report["accuracy"] == pytest.approx(float((model(X).argmax(1) == labels).float().mean()))
    assert report.figures[0].count == 12
    report = evaluate(model, iter(batches), "accuracy", dense)
    assert report.figures[0].dense == pytest.approx(float((dense(X).argmax(1) == labels).float().mean()))
    rows = nn.functional.cosine_similarity(dense(X), model(X)).detach()
    assert evaluate(model, batches, dense=dense)["similarity"] == pytest.approx(float(rows.mean()), abs=1e-6)
    units = [nn.functional.normalize(m(X).double()).detach() for m in (dense, model)]
    pairs = torch.triu_indices(12, 12, 1)
    cosines = [(unit @ unit.T)[pairs[0], pairs[1]] for unit in units]
    expected = 100 * stats.spearmanr(*cosines).statistic
    assert evaluate(model, [X], "rank", dense)["rank"] == pytest.approx(expected, abs=0.1)


def test_padding_in_batches_never_counts(encoders):
    dense, model = (encoder.bert for encoder in encoders)
    ids = torch.randint(2048, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(3, dtype=torch.long)}
    other = {**batch, "input_ids": torch.where(mask.bool(), ids, 5)}
    for metric in ("similarity", "embedding_similarity", "rank"):
        first, second = (evaluate(model, [b], metric, dense).figures[0] for b in (batch, other))
        assert first.value == pytest.approx(second.value, abs=1e-5)
        assert first.count == (19 if metric == "similarity" else 3)
        assert first.value != pytest.approx(evaluate(model, [{"input_ids": ids}], metric, dense)[metric], abs=1e-6)


def largest(model, data):
    return max(float(model(x).detach().max()) for x in data)


def test_a_function_of_the_user(tmp_path):
    dense, model = classifiers()
    report = evaluate(model, [X], largest, dense)
    (figure,) = report.figures
    assert figure == Figure("largest", largest(model, [X]), largest(dense, [X]))
    assert figure.higher_is_better is None
    report = evaluate(model, [str(tmp_path / "a.txt"), tmp_path / "b.txt"], lambda model, path: len(str(path)))
    assert [figure.file for figure in report.figures] == ["a.txt", "b.txt"]
    with pytest.raises(TypeError, match="metric must return a number, got str"):
        evaluate(model, [X], lambda model, data: "good")


class Tokens(nn.Sequential):
    """A model of tokens without logits."""

    def forward(self, input_ids):
        return super().forward(input_ids)


def test_mistakes_with_batches_are_named():
    dense, model = classifiers()
    with pytest.raises(RecipeError, match="nothing to measure"):
        evaluate(model, [X])
    with pytest.raises(RecipeError, match="rank compares with the dense model"):
        evaluate(model, [X], "rank")
    with pytest.raises(RecipeError, match="unknown metric 'spearman'"):
        evaluate(model, [X], "spearman")
    with pytest.raises(StatisticsError, match="data is empty"):
        evaluate(model, [])
    for single in (X, {"x": X}, 3):
        with pytest.raises(TypeError, match="data must be a path, several, or an iterable of batches"):
            evaluate(model, single)
    with pytest.raises(StatisticsError, match="batch 1 has no labels"):
        evaluate(model, [(X, torch.zeros(12, dtype=torch.long)), X], "accuracy")
    with pytest.raises(StatisticsError, match="Tokens returned no logits"):
        perplexity(Tokens(nn.Embedding(9, 4)), [torch.zeros(2, 3, dtype=torch.long)])
    narrow = nn.Linear(6, 2)
    with pytest.raises(StatisticsError, match=r"no similarity: the dense model gives \[12, 3\], this one \[12, 2\]"):
        evaluate(narrow, [X], dense=dense)
    assert evaluate(narrow, [X], "rank", dense).figures[0].count == 12
    with pytest.raises(StatisticsError, match=r"Sequential fails on a batch \[12, 5\]"):
        evaluate(model, [X[:, :5]], dense=dense)
    with pytest.raises(TypeError, match="model must be"):
        evaluate("model", [X])


# Reports

REPORT = EvaluationReport(
    (
        Figure("perplexity", 12.5, 10.0, 500, "tokens", False, "a<b>.txt"),
        Figure("rank", math.nan, 100.0, 3, "sentences", True, "b.txt", "a note"),
        Figure("mine", 1.0),
    ),
    "model",
    "dense",
    1.5,
    ("something | else",),
    secateur.reports.versions(),
)


def test_a_report_is_written_and_read():
    table = json.loads(REPORT.to_json())
    assert table["figures"][0]["difference"] == 2.5
    again = EvaluationReport.from_json(REPORT.to_json())
    assert again.to_json() == REPORT.to_json()
    assert again.figures[::2] == REPORT.figures[::2]
    assert REPORT["perplexity"] == 12.5
    with pytest.raises(KeyError, match="measured: perplexity, rank, mine"):
        REPORT["accuracy"]
    for text in ("[]", "{}", '{"figures": [{}]}', '{"figures": [], "model": "", "other": 1}', "no JSON"):
        with pytest.raises(ValueError, match=r"not a report|Expecting value"):
            EvaluationReport.from_json(text)


def test_a_report_is_shown():
    text = str(REPORT)
    assert "perplexity 12.50 (dense 10.00, +2.5) on 500 tokens of a<b>.txt" in text
    markdown = REPORT.to_markdown()
    assert "| perplexity | a&lt;b>.txt | 500 tokens | 12.50 | 10.00 | +2.5 | lower |  |" in markdown
    assert "Something \\| else." in markdown
    page = REPORT.to_html()
    assert "a&lt;b&gt;.txt" in page
    assert "<b>" not in page
    assert "a note" in page
