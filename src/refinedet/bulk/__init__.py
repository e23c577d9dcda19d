"""Batch prediction: any number of images to Parquet parts, resumable (extra ``refinedet[batch]``)."""
