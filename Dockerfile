# CPU image: `docker build -t eurus .`, then `docker run -p 8000:8000 eurus`. Runs with a read-only root file system.
FROM rust:1.95-slim-trixie AS build
# onig and ring are C code.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential pkg-config && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock rust-toolchain.toml clippy.toml ./
COPY src src
COPY models models
COPY benches benches
RUN cargo build --release --locked --bin eurus && strip target/release/eurus

FROM debian:trixie-slim
# Certificates for downloads from the hub.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10001 -g 10001 /data
COPY --from=build /src/target/release/eurus /usr/local/bin/eurus
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
