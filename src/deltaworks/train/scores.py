"""Scores over the outcomes of single examples."""

import math
from collections import Counter
from typing import Any


def classification_scores(outcomes: list[dict[str, float]]) -> dict[str, Any]:
    """Accuracy, macro F1 over the classes that occur, and the mean loss in nats.

    Args:
        outcomes: Per example "label", "guess" (a class index, -1 for none) and "loss".
    """
    labels = [int(outcome["label"]) for outcome in outcomes]
    guesses = [int(outcome["guess"]) for outcome in outcomes]
    correct = [int(label == guess) for label, guess in zip(labels, guesses, strict=True)]
    right = Counter(label for label, hit in zip(labels, correct, strict=True) if hit)
    of_label, of_guess = Counter(labels), Counter(guess for guess in guesses if guess >= 0)
    # F1 = 2 true positives / (labelled + guessed)
    f1 = [2 * right[name] / (of_label[name] + of_guess[name]) for name in sorted(of_label | of_guess)]
    return {
        "score": sum(correct) / len(correct),
        "macro_f1": sum(f1) / len(f1),
        "loss": sum(outcome["loss"] for outcome in outcomes) / len(outcomes),
        "correct": correct,
    }


def token_scores(outcomes: list[dict[str, float]]) -> dict[str, Any]:
    """Accuracy, mean loss in nats and perplexity over all target tokens.

    "values" are the fractions of right tokens of the examples and "weights" their numbers of tokens, so the score
    is the mean of "values" weighted by "weights".

    Args:
        outcomes: Per example "right" and "tokens" (counts) and "loss" (the sum over its tokens).
    """
    tokens = [int(outcome["tokens"]) for outcome in outcomes]
    total = sum(tokens)
    loss = sum(outcome["loss"] for outcome in outcomes) / total if total else math.nan
    return {
        "score": sum(outcome["right"] for outcome in outcomes) / total if total else math.nan,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else (math.nan if math.isnan(loss) else math.inf),
        "values": [outcome["right"] / max(1, outcome["tokens"]) for outcome in outcomes],
        "weights": tokens,
    }
