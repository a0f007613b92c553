# Airflow with the moegen provider. The base image has httpx and everything else that the provider needs.
ARG AIRFLOW_IMAGE=apache/airflow:3.3.2
FROM ${AIRFLOW_IMAGE}
COPY --chown=airflow:0 pyproject.toml README.md LICENSE /tmp/moegen-airflow/
COPY --chown=airflow:0 moegen_airflow /tmp/moegen-airflow/moegen_airflow
RUN pip install --no-cache-dir --no-deps /tmp/moegen-airflow \
    && mkdir -p /opt/airflow/state /opt/airflow/logs
