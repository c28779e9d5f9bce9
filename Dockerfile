# CPU image: `docker build -t eurus .`, then `docker run -p 8000:8000 eurus`. Runs with a read-only root file system.
# GPU image: `docker build -t eurus-gpu --target gpu .`, then `docker run --gpus all -p 8000:8000 eurus-gpu`.
FROM rust:1.95-slim-trixie AS sources
# onig and ring are C code.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential pkg-config && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock rust-toolchain.toml clippy.toml build.rs ./
COPY src src
COPY models models
COPY benches benches

FROM sources AS build
RUN cargo build --release --locked --bin eurus && strip target/release/eurus

FROM sources AS build-gpu
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
COPY .cargo .cargo
COPY kernels kernels
RUN kernels/toolchain.sh && cargo build --release --locked --features cuda --bin eurus && strip target/release/eurus
# The libraries that are looked for when a GPU is opened; the driver comes from the host.
RUN .cuda/bin/pip install --quiet --no-deps --target /libraries nvidia-cublas==13.0.2.14 nvidia-curand==10.4.0.35

FROM debian:trixie-slim AS runtime
# Certificates for downloads from the hub.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10001 -g 10001 /data
COPY LICENSE /usr/share/doc/eurus/LICENSE
LABEL org.opencontainers.image.title="eurus" \
      org.opencontainers.image.description="Serves policies and reward models" \
      org.opencontainers.image.licenses="Apache-2.0"
# Inside a container loopback reaches nobody; publish the port only where you want it, or set EURUS_SERVER__API_KEY_FILE.
ENV HF_HOME=/data EURUS_SERVER__HOST=0.0.0.0
USER 10001
VOLUME /data
WORKDIR /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s CMD ["eurus", "health"]
ENTRYPOINT ["eurus"]
CMD ["serve"]

FROM runtime AS gpu
COPY --from=build-gpu /libraries/nvidia/cu13/lib /usr/local/lib/eurus
COPY --from=build-gpu /src/target/release/eurus /usr/local/bin/eurus
ENV LD_LIBRARY_PATH=/usr/local/lib/eurus NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime
COPY --from=build /src/target/release/eurus /usr/local/bin/eurus
