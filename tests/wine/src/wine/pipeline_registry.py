"""The pipelines of this project."""

from kedro.pipeline import Pipeline

from wine.pipelines import modelling, processing, reporting


def register_pipelines() -> dict[str, Pipeline]:
    """Register the whole pipeline, and its first two parts."""
    data, models = processing.create_pipeline(), modelling.create_pipeline()
    return {
        "__default__": data + models + reporting.create_pipeline(),
        "processing": data,
        "modelling": data + models,
    }
