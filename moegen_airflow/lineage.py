"""What a finished job tells OpenLineage: the files that it read, the folder that it wrote, and how much.

OpenLineage's packages are imported only when its listener asks; whatever goes wrong is logged, and fails no task.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

_MOST_FILES = 16  # named one by one; of more, their folders

log = logging.getLogger(__name__)


def facets_on_complete(manifest: Mapping[str, Any] | None, output_uri: str) -> Any:
    """An `OperatorLineage`; None without a manifest, without OpenLineage, or when it could not be made."""
    if manifest is None:
        return None
    try:
        from airflow.providers.openlineage.extractors import OperatorLineage
        from openlineage.client.event_v2 import InputDataset, OutputDataset
        from openlineage.client.facet_v2 import output_statistics_output_dataset

        parts = manifest["parts"]
        statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
            rowCount=manifest["rows"], size=sum(part["size_bytes"] for part in parts), fileCount=len(parts)
        )
        written = OutputDataset(*dataset_name(output_uri), outputFacets={"outputStatistics": statistics})
        read = [InputDataset(*dataset_name(uri)) for uri in input_places(manifest)]
        return OperatorLineage(inputs=read, outputs=[written])
    except ImportError:
        return None
    except Exception as error:
        log.warning("OpenLineage is told nothing of this job: %s: %s", type(error).__name__, error)
        return None


def input_places(manifest: Mapping[str, Any]) -> list[str]:
    """The input's files; where there are many, the folders that they lie in."""
    files = [file["uri"] for file in manifest["input_files"]]
    return files if len(files) <= _MOST_FILES else sorted({uri.rpartition("/")[0] for uri in files})


def dataset_name(uri: str) -> tuple[str, str]:
    """Namespace and name as OpenLineage's naming rules have them: `s3://bucket` and `path`, or `file` and `/path`."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return "file", str(PurePosixPath(parts.path))
    return f"{parts.scheme}://{parts.netloc}", parts.path.strip("/") or "/"
