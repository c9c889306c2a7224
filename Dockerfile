FROM python:3.13-slim

# for top, to watch the leak
RUN apt-get update \
 && apt-get install -y --no-install-recommends procps \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --system --no-create-home harness
WORKDIR /harness

# dependencies have their own layer: editing a source does not install them again
COPY requirements.txt .
RUN python -m pip install --no-cache-dir --root-user-action=ignore -r requirements.txt

USER harness
COPY beequeue ./beequeue
COPY harness ./harness
COPY config.py client.py worker.py ./
