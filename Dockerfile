# Builds the product from a clean checkout and leaves an image that holds only what runs.
#   docker build -t overlaybd-worker .
#   docker run --privileged -v /dev:/dev -v /run/overlaybd-snapshotter:/run/overlaybd-snapshotter \
#     -v /var/lib/containerd:/var/lib/containerd:rshared overlaybd-worker
FROM debian:bookworm AS build
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends nodejs npm make ca-certificates
WORKDIR /src
COPY . .
RUN BOOTSTRAP_SCOPE=build make install PREFIX=/opt/overlaybd

FROM debian:bookworm-slim
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends e2fsprogs xfsprogs util-linux liblz4-1 libzstd1 libcurl4 libssl3 ca-certificates \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/overlaybd /opt/overlaybd
COPY --from=build /etc/overlaybd-snapshotter /etc/overlaybd-snapshotter
COPY LICENSE /opt/overlaybd/LICENSE
ENV PATH=/opt/overlaybd/bin:$PATH
# blockd is started by the snapshotter and serves devices from the same container.
ENTRYPOINT ["/opt/overlaybd/bin/overlaybd-snapshotter"]
