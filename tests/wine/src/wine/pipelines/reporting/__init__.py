"""Which model is best, in numbers and as a picture."""

from typing import Any

from kedro.pipeline import Pipeline, node
from matplotlib.figure import Figure

NAMES = ("logistic", "forest", "neighbours")


def choose_best(*models_and_accuracies: Any) -> tuple[Any, dict[str, Any]]:
    """Keep the most accurate model, and say how accurate each is."""
    models, accuracies = models_and_accuracies[:3], models_and_accuracies[3:]
    best = max(range(3), key=accuracies.__getitem__)
    metrics = {"best": NAMES[best], "accuracy": dict(zip(NAMES, accuracies, strict=True))}
    return models[best], metrics


def plot_accuracy(metrics: dict[str, Any]) -> Figure:
    """Draw the accuracies as bars."""
    figure = Figure(figsize=(5, 3), layout="tight")
    axes = figure.subplots()
    axes.bar(metrics["accuracy"].keys(), metrics["accuracy"].values())
    axes.set(ylim=(0.8, 1), ylabel="accuracy on test wines", title="Whose wine is it?")
    return figure


def create_pipeline() -> Pipeline:
    """Compare the models, draw the picture."""
    inputs = [f"models.{name}_{kind}" for kind in ("model", "accuracy") for name in NAMES]
    return Pipeline(
        [
            node(choose_best, inputs, ["best_model", "metrics"], name="choose_best"),
            node(plot_accuracy, "metrics", "plot", name="plot_accuracy"),
        ]
    )
