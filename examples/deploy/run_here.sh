#!/usr/bin/env bash
# The whole of docs/deploy.md on one machine: a server and two sites as separate processes, with TLS and node
# authentication. Certificates and keys are made here and never committed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
port=${PORT:-9443}
folder=${1:-$(mktemp -d)}
mkdir -p "$folder" && cd "$folder"
echo "working in $folder"

python "$here/make_data.py"
atoll certify --host 127.0.0.1 --out certificates
mkdir -p sites
for site in lyon oslo; do
  atoll certify --site $site --out $site
  cp $site/$site.pub sites/
  cp certificates/ca.pem $site/
done

trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
for site in lyon oslo; do
  (cd $site && exec atoll join --server 127.0.0.1:$port --certificate ca.pem --key $site.key \
    --data "../data/$site.csv" --policy "$here/policy.yaml" --out memory > join.log 2>&1) &
done
atoll server "$here/recipe.yaml" --host 127.0.0.1 --port $port --out run
ls */memory/*/model/model.safetensors
