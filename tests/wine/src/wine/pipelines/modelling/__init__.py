"""Three models, trained side by side."""

from typing import Any

import pandas as pd
from kedro.pipeline import Pipeline, node
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def _fit(model: Any, train: pd.DataFrame) -> Any:
    return make_pipeline(StandardScaler(), model).fit(train.drop(columns="target"), train["target"])


def train_logistic(train: pd.DataFrame, options: dict) -> Any:
    """Train a logistic regression."""
    return _fit(LogisticRegression(random_state=options["random_state"]), train)


def train_forest(train: pd.DataFrame, options: dict) -> Any:
    """Train a random forest."""
    forest = RandomForestClassifier(options["trees"], random_state=options["random_state"])
    return _fit(forest, train)


def train_neighbours(train: pd.DataFrame, options: dict) -> Any:
    """Train a nearest-neighbours classifier."""
    return _fit(KNeighborsClassifier(options["neighbours"]), train)


def evaluate(model: Any, test: pd.DataFrame) -> float:
    """Measure the share of test wines given to the right grower."""
    return round(float(model.score(test.drop(columns="target"), test["target"])), 4)


def create_pipeline() -> Pipeline:
    """Train and evaluate each model, in the namespace `models`."""
    models = {
        "logistic": train_logistic,
        "forest": train_forest,
        "neighbours": train_neighbours,
    }
    nodes = []
    for name, train in models.items():
        nodes += [
            node(train, ["train", "params:models"], f"{name}_model", name=f"train_{name}"),
            node(evaluate, [f"{name}_model", "test"], f"{name}_accuracy", name=f"evaluate_{name}"),
        ]
    return Pipeline(
        nodes, namespace="models", inputs={"train", "test"}, parameters={"params:models"}
    )
