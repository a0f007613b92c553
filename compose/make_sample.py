"""What the sample Dag needs: the bucket, the demo's table in it, the demo's model in the models volume. Idempotent."""

from __future__ import annotations

import shutil
from pathlib import Path

from botocore.exceptions import ClientError
from botocore.session import get_session

BUCKET, TABLE = "lake", "tickets/tickets.parquet"
DEMO, MODEL = Path("/demo"), Path("/models/tickets")


def main() -> None:
    """Says what it made."""
    s3 = get_session().create_client("s3")
    if BUCKET not in {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}:
        s3.create_bucket(Bucket=BUCKET)
        print(f"made bucket {BUCKET}")
    try:
        s3.head_object(Bucket=BUCKET, Key=TABLE)  # written again it would be another input to every job
    except ClientError:
        s3.put_object(Bucket=BUCKET, Key=TABLE, Body=(DEMO / "tickets.parquet").read_bytes())
        print(f"wrote s3://{BUCKET}/{TABLE}")
    if not MODEL.exists():
        aside = MODEL.with_name(".tickets")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(DEMO / "model", aside, copy_function=shutil.copyfile)
        aside.rename(MODEL)
        print(f"copied the demo's model to {MODEL}")


if __name__ == "__main__":
    main()
