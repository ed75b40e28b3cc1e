"""From the raw table to training and test sets."""

import pandas as pd
from kedro.pipeline import Pipeline, node
from sklearn.model_selection import train_test_split


def load_wine(raw: pd.DataFrame) -> pd.DataFrame:
    """Refuse a table that has no target."""
    if "target" not in raw.columns:
        raise ValueError(f"no column 'target' among {list(raw.columns)}")
    return raw


def clean_wine(wine: pd.DataFrame) -> pd.DataFrame:
    """Drop what is incomplete or there twice."""
    return wine.dropna().drop_duplicates().reset_index(drop=True)


def make_features(wine: pd.DataFrame) -> pd.DataFrame:
    """Add how much of the phenols are flavanoids."""
    return wine.assign(flavanoid_share=wine["flavanoids"] / wine["total_phenols"])


def split_wine(features: pd.DataFrame, options: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split into training and test rows, with the same share of each grower."""
    train, test = train_test_split(features, stratify=features["target"], **options)
    return train, test


def create_pipeline() -> Pipeline:
    """Load, clean, features, split."""
    return Pipeline(
        [
            node(load_wine, "raw_wine", "wine", name="load_wine"),
            node(clean_wine, "wine", "clean_wine", name="clean_wine"),
            node(make_features, "clean_wine", "features", name="make_features"),
            node(split_wine, ["features", "params:split"], ["train", "test"], name="split_wine"),
        ]
    )
