import gc
import shlex
import sys
from pathlib import Path

from snakemake.utils import Paramspace, min_version

from peftscope.layout import CONTRIBUTED_RESULTS
from peftscope.planning.demands import JobDemands
from peftscope.memory.grid import grid, sources
from peftscope.planning.plan import load_workflow
from peftscope.planning.sweep import ROUNDS
from peftscope.spec import RUN_ID_PATTERN

min_version("9.0")
# A plan of many jobs is millions of objects that stay: looking for garbage among them took a fifth of a dry run.
gc.set_threshold(200_000)
# The jobs use the Python that Snakemake itself runs on, whatever PATH says. They are its own children (exec), and die
# with it: those of a workflow that was killed must not write beside those of the next one. The prefix is also that of a
# workflow that uses this one as a module, whose commands may be several: there it ends without exec.
shell.prefix(
    f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH PEFTSCOPE_DIES_WITH_PARENT=1; "
    + ("exec " if workflow.modifier.is_main_snakefile() else "")
)

WORKFLOW = load_workflow(config)
DEMANDS = JobDemands(WORKFLOW)
GRID = Paramspace(grid())
CALCULATOR = sources()
CONTRIBUTED = sorted(map(str, CONTRIBUTED_RESULTS.rglob("*.json")))


wildcard_constraints:
    experiment=r"[a-z0-9-]+",
    run_id=RUN_ID_PATTERN,
    model=r"[^/]+",
    task=r"[^/]+",
    benchmark=r"[^/]+",
    field=r"[a-z0-9_]+",
    round=r"[0-9]",


# On a cluster, rules with `localrule` stay where Snakemake runs: they are short, or need the network that nodes may not have.
rule all:
    input:
        expand("results/{experiment}/all-runs-ended-well", experiment=WORKFLOW.names),
    localrule: True


rule fetch_model:
    output:
        "resources/models/{model}/manifest.json",
    log:
        "resources/models/{model}.log",
    benchmark:
        "resources/models/{model}.benchmark.tsv"
    localrule: True
    params:
        name=WORKFLOW.model_name,
        revision=WORKFLOW.model_revision,
    shell:
        "python -m peftscope fetch {params.name:q} {params.revision} > {log:q} 2>&1"


rule make_task:
    output:
        "resources/tasks/{task}/manifest.json",
    log:
        "resources/tasks/{task}.log",
    benchmark:
        "resources/tasks/{task}.benchmark.tsv"
    localrule: True
    shell:
        "python -m peftscope make-task {wildcards.task:q} > {log:q} 2>&1"


rule make_benchmark:
    output:
        "resources/benchmarks/{benchmark}/manifest.json",
    log:
        "resources/benchmarks/{benchmark}.log",
    localrule: True
    shell:
        "python -m peftscope make-benchmark {wildcards.benchmark:q} > {log} 2>&1"


rule train:
    input:
        # A model that is fetched again is the same model: its date must not make finished runs old.
        model=ancient(WORKFLOW.model_manifest),
        task=ancient(WORKFLOW.task_manifest),
        benchmarks=ancient(WORKFLOW.benchmark_manifests),
        start=ancient(WORKFLOW.start_record),
    output:
        spec="results/runs/{run_id}/spec.json",
        record="results/runs/{run_id}/record.json",
    log:
        "results/runs/{run_id}/train.log",
    benchmark:
        "results/runs/{run_id}/train.tsv"
    # For jobs that are killed from outside; whatever else happens in a run is a status in its record.
    retries: 2
    threads: WORKFLOW.threads
    resources:
        gpu=WORKFLOW.gpus,
        mem_mb=DEMANDS.memory_mb,
        runtime=DEMANDS.minutes,
        # Profiles change these three: seconds between checkpoints, whether another attempt has more memory, and which
        # trained weights stay (all, adapters or none).
        checkpoint_seconds=300,
        attempts_left=0,
        keep_weights="adapters",
    params:
        spec=WORKFLOW.spec_json,
        options=WORKFLOW.options,
    shell:
        "python -m peftscope run {params.spec:q} --threads {threads} --output $(dirname {output.record:q}) --checkpoint-seconds {resources.checkpoint_seconds} --attempts-left {resources.attempts_left} --keep-weights {resources.keep_weights} {params.options} > {log} 2>&1"


# The learning rates of a study's arms: three around the best listed one, then up to twice one more beyond an end.
checkpoint rates:
    input:
        WORKFLOW.rate_records(checkpoints),
        WORKFLOW.experiment_file,
        workflow.source_path("src/peftscope/analysis/tuning.py"),
    output:
        "results/{experiment}/rates-{round}.json",
    log:
        "results/{experiment}/logs/rates-{round}.log",
    localrule: True
    shell:
        "python -m peftscope tune {wildcards.experiment} {wildcards.round} 2>&1 | tee {log}"


checkpoint tune:
    input:
        WORKFLOW.rate_records(checkpoints),
        WORKFLOW.experiment_file,
        workflow.source_path("src/peftscope/analysis/tuning.py"),
    output:
        "results/{experiment}/tuned.json",
    log:
        "results/{experiment}/logs/tune.log",
    localrule: True
    params:
        round=ROUNDS,
    shell:
        "python -m peftscope tune {wildcards.experiment} {params.round} 2>&1 | tee {log}"


rule collect:
    input:
        WORKFLOW.records(checkpoints),
        WORKFLOW.experiment_file,
        workflow.source_path("src/peftscope/analysis/collect.py"),
        workflow.source_path("src/peftscope/planning/published.py"),
    output:
        runs="results/{experiment}/runs.csv",
        losses="results/{experiment}/losses.csv",
    log:
        "results/{experiment}/logs/collect.log",
    benchmark:
        "results/{experiment}/benchmarks/collect.tsv"
    localrule: True
    shell:
        "python -m peftscope collect {wildcards.experiment} > {log} 2>&1"


rule tables:
    input:
        "results/{experiment}/runs.csv",
        workflow.source_path("src/peftscope/report/benchmarks.py"),
        workflow.source_path("src/peftscope/report/tables.py"),
        workflow.source_path("src/peftscope/analysis/stats.py"),
    output:
        report(
            "results/{experiment}/tables/methods.html",
            caption="src/peftscope/report/captions/methods.rst",
            category="Tables",
            labels={"experiment": "{experiment}", "table": "methods"},
        ),
        report(
            "results/{experiment}/tables/runs.html",
            caption="src/peftscope/report/captions/runs.rst",
            category="Tables",
            labels={"experiment": "{experiment}", "table": "all runs"},
        ),
        report(
            "results/{experiment}/tables/predictions.html",
            caption="src/peftscope/report/captions/predictions.rst",
            category="Tables",
            labels={"experiment": "{experiment}", "table": "predicted memory"},
        ),
        report(
            "results/{experiment}/tables/benchmarks.html",
            caption="src/peftscope/report/captions/benchmarks.rst",
            category="Tables",
            labels={"experiment": "{experiment}", "table": "lm-eval's benchmarks"},
        ),
        "results/{experiment}/tables/benchmarks.csv",
        "results/{experiment}/tables/predictions.csv",
        "results/{experiment}/tables/methods.csv",
        "results/{experiment}/tables/methods.md",
        "results/{experiment}/tables/ladders.csv",
    log:
        "results/{experiment}/logs/tables.log",
    benchmark:
        "results/{experiment}/benchmarks/tables.tsv"
    localrule: True
    shell:
        "python -m peftscope tables {wildcards.experiment} > {log} 2>&1"


rule figures:
    input:
        "results/{experiment}/runs.csv",
        "results/{experiment}/losses.csv",
        workflow.source_path("src/peftscope/report/plots.py"),
        workflow.source_path("src/peftscope/report/svg.py"),
        workflow.source_path("src/peftscope/report/tables.py"),
    output:
        report(
            "results/{experiment}/figures/pareto.svg",
            caption="src/peftscope/report/captions/pareto.rst",
            category="Figures",
            labels={"experiment": "{experiment}", "figure": "quality against memory"},
        ),
        report(
            "results/{experiment}/figures/memory.svg",
            caption="src/peftscope/report/captions/memory.rst",
            category="Figures",
            labels={"experiment": "{experiment}", "figure": "memory by phase"},
        ),
        report(
            "results/{experiment}/figures/throughput.svg",
            caption="src/peftscope/report/captions/throughput.rst",
            category="Figures",
            labels={"experiment": "{experiment}", "figure": "throughput"},
        ),
        report(
            "results/{experiment}/figures/losses.svg",
            caption="src/peftscope/report/captions/losses.rst",
            category="Figures",
            labels={"experiment": "{experiment}", "figure": "loss curves"},
        ),
        report(
            "results/{experiment}/figures/prediction.svg",
            caption="src/peftscope/report/captions/prediction.rst",
            category="Figures",
            labels={
                "experiment": "{experiment}",
                "figure": "predicted against measured memory",
            },
        ),
    log:
        "results/{experiment}/logs/figures.log",
    benchmark:
        "results/{experiment}/benchmarks/figures.tsv"
    localrule: True
    shell:
        "python -m peftscope figures {wildcards.experiment} > {log} 2>&1"


rule ladder:
    input:
        "results/{experiment}/runs.csv",
        workflow.source_path("src/peftscope/report/plots.py"),
        workflow.source_path("src/peftscope/report/svg.py"),
        workflow.source_path("src/peftscope/report/tables.py"),
    output:
        report(
            "results/{experiment}/figures/ladder-{field}.svg",
            caption="src/peftscope/report/captions/ladder.rst",
            category="Figures",
            labels={"experiment": "{experiment}", "figure": "ladder over {field}"},
        ),
    log:
        "results/{experiment}/logs/ladder-{field}.log",
    benchmark:
        "results/{experiment}/benchmarks/ladder-{field}.tsv"
    localrule: True
    shell:
        "python -m peftscope ladder {wildcards.experiment} {wildcards.field} > {log} 2>&1"


# Only studies have these: the report asks for them.
rule study:
    input:
        "results/{experiment}/runs.csv",
        "results/{experiment}/losses.csv",
        WORKFLOW.tuned,
        workflow.source_path("src/peftscope/analysis/compare.py"),
        workflow.source_path("src/peftscope/analysis/study.py"),
        workflow.source_path("src/peftscope/analysis/stats.py"),
        workflow.source_path("src/peftscope/report/study.py"),
        workflow.source_path("src/peftscope/report/plots.py"),
        workflow.source_path("src/peftscope/report/svg.py"),
        workflow.source_path("src/peftscope/report/tables.py"),
    output:
        report(
            "results/{experiment}/figures/tuning.svg",
            caption="src/peftscope/report/captions/tuning.rst",
            category="Study",
            labels={
                "experiment": "{experiment}",
                "figure": "learning rates that were tried",
            },
        ),
        report(
            "results/{experiment}/figures/differences.svg",
            caption="src/peftscope/report/captions/differences.rst",
            category="Study",
            labels={
                "experiment": "{experiment}",
                "figure": "differences between arms",
            },
        ),
        report(
            "results/{experiment}/tables/contrasts.html",
            caption="src/peftscope/report/captions/differences.rst",
            category="Study",
            labels={"experiment": "{experiment}", "table": "differences between arms"},
        ),
        report(
            "results/{experiment}/tables/controls.html",
            caption="src/peftscope/report/captions/controls.rst",
            category="Study",
            labels={"experiment": "{experiment}", "table": "controls"},
        ),
        report(
            "results/{experiment}/tables/tuning.html",
            caption="src/peftscope/report/captions/tuning.rst",
            category="Study",
            labels={
                "experiment": "{experiment}",
                "table": "learning rates that were tried",
            },
        ),
        "results/{experiment}/tables/contrasts.csv",
        "results/{experiment}/tables/controls.csv",
        "results/{experiment}/tables/tuning.csv",
    log:
        "results/{experiment}/logs/study.log",
    benchmark:
        "results/{experiment}/benchmarks/study.tsv"
    localrule: True
    shell:
        "python -m peftscope study {wildcards.experiment} > {log} 2>&1"


# Only experiments on random strings have these.
rule capacity:
    input:
        "results/{experiment}/runs.csv",
        workflow.source_path("src/peftscope/analysis/capacity.py"),
        workflow.source_path("src/peftscope/report/capacity.py"),
    output:
        report(
            "results/{experiment}/figures/capacity.svg",
            caption="src/peftscope/report/captions/capacity.rst",
            category="Figures",
            labels={"experiment": "{experiment}", "figure": "bits stored"},
        ),
        report(
            "results/{experiment}/tables/capacity.html",
            caption="src/peftscope/report/captions/capacity.rst",
            category="Tables",
            labels={"experiment": "{experiment}", "table": "bits stored"},
        ),
        "results/{experiment}/tables/capacity.csv",
        "results/{experiment}/tables/stored.csv",
    log:
        "results/{experiment}/logs/capacity.log",
    benchmark:
        "results/{experiment}/benchmarks/capacity.tsv"
    localrule: True
    shell:
        "python -m peftscope capacity {wildcards.experiment} > {log} 2>&1"


# Only experiments that keep weights along the training have these two.
rule measure:
    input:
        # A run that is trained again has the same weights.
        ancient("results/runs/{run_id}/record.json"),
    output:
        "results/runs/{run_id}/weights.csv",
    log:
        "results/runs/{run_id}/measure.log",
    benchmark:
        "results/runs/{run_id}/measure.tsv"
    resources:
        mem_mb=4000,
    shell:
        "python -m peftscope measure {wildcards.run_id} > {log} 2>&1"


rule weights:
    input:
        WORKFLOW.measured(checkpoints),
        "results/{experiment}/runs.csv",
        workflow.source_path("src/peftscope/analysis/study.py"),
        workflow.source_path("src/peftscope/analysis/weights.py"),
        workflow.source_path("src/peftscope/report/weights.py"),
    output:
        "results/{experiment}/tables/weights.parquet",
        report(
            "results/{experiment}/figures/updates.svg",
            caption="src/peftscope/report/captions/updates.rst",
            category="Figures",
            labels={"experiment": "{experiment}", "figure": "updates of weights"},
        ),
    log:
        "results/{experiment}/logs/weights.log",
    benchmark:
        "results/{experiment}/benchmarks/weights.tsv"
    localrule: True
    shell:
        "python -m peftscope weights {wildcards.experiment} > {log} 2>&1"


# Only studies that score prose along the training have this.
rule forgetting:
    input:
        "results/{experiment}/runs.csv",
        "results/{experiment}/losses.csv",
        WORKFLOW.tuned,
        workflow.source_path("src/peftscope/analysis/study.py"),
        workflow.source_path("src/peftscope/analysis/forgetting.py"),
        workflow.source_path("src/peftscope/report/forgetting.py"),
    output:
        report(
            "results/{experiment}/figures/forgetting.svg",
            caption="src/peftscope/report/captions/forgetting.rst",
            category="Study",
            labels={
                "experiment": "{experiment}",
                "figure": "task loss against prose",
            },
        ),
    log:
        "results/{experiment}/logs/forgetting.log",
    benchmark:
        "results/{experiment}/benchmarks/forgetting.tsv"
    localrule: True
    shell:
        "python -m peftscope forgetting {wildcards.experiment} > {log} 2>&1"


# Only studies with arms on few examples have this.
rule overfitting:
    input:
        "results/{experiment}/runs.csv",
        "results/{experiment}/losses.csv",
        WORKFLOW.tuned,
        workflow.source_path("src/peftscope/analysis/study.py"),
        workflow.source_path("src/peftscope/report/overfitting.py"),
    output:
        report(
            "results/{experiment}/figures/overfitting.svg",
            caption="src/peftscope/report/captions/overfitting.rst",
            category="Study",
            labels={
                "experiment": "{experiment}",
                "figure": "few examples along the training",
            },
        ),
    log:
        "results/{experiment}/logs/overfitting.log",
    benchmark:
        "results/{experiment}/benchmarks/overfitting.tsv"
    localrule: True
    shell:
        "python -m peftscope overfitting {wildcards.experiment} > {log} 2>&1"


# Only studies of three or more ranks, alphas or dimensions have this.
rule shares:
    input:
        "results/{experiment}/runs.csv",
        WORKFLOW.tuned,
        workflow.source_path("src/peftscope/analysis/study.py"),
        workflow.source_path("src/peftscope/report/shares.py"),
    output:
        report(
            "results/{experiment}/figures/shares.svg",
            caption="src/peftscope/report/captions/shares.rst",
            category="Study",
            labels={
                "experiment": "{experiment}",
                "figure": "gain over what varies",
            },
        ),
    log:
        "results/{experiment}/logs/shares.log",
    benchmark:
        "results/{experiment}/benchmarks/shares.tsv"
    localrule: True
    shell:
        "python -m peftscope shares {wildcards.experiment} > {log} 2>&1"


# What follows from the code alone is made once for all experiments.
rule memory_curve:
    input:
        CALCULATOR,
    output:
        f"results/memory/curves/{GRID.wildcard_pattern}.csv",
    log:
        f"results/memory/logs/curve-{GRID.wildcard_pattern}.log",
    localrule: True
    shell:
        "python -m peftscope memory-curve {wildcards.method} {wildcards.axis} > {output} 2> {log}"


rule memory_figures:
    input:
        curves=expand("results/memory/curves/{point}.csv", point=GRID.instance_patterns),
        code=[
            workflow.source_path("src/peftscope/report/memory.py"),
            workflow.source_path("src/peftscope/report/plots.py"),
            workflow.source_path("src/peftscope/report/svg.py"),
        ],
    output:
        report(
            "results/memory/grid.svg",
            caption="src/peftscope/report/captions/memory-grid.rst",
            category="Memory",
            labels={"figure": "over rank, length, batch and method"},
        ),
        report(
            "results/memory/bars.svg",
            caption="src/peftscope/report/captions/memory-bars.rst",
            category="Memory",
            labels={"figure": "7B to 70B"},
        ),
    log:
        "results/memory/logs/figures.log",
    localrule: True
    shell:
        "python -m peftscope memory-figures {input.curves} > {log} 2>&1"


rule report:
    input:
        rules.memory_figures.output,
        rules.tables.output,
        rules.figures.output,
        WORKFLOW.figures,
        CONTRIBUTED,
        workflow.source_path("src/peftscope/analysis/contributed.py"),
        workflow.source_path("src/peftscope/report/contributed.py"),
        workflow.source_path("src/peftscope/report/page.py"),
        workflow.source_path("src/peftscope/report/memory.py"),
        workflow.source_path("src/peftscope/report/sentences.py"),
        workflow.source_path("src/peftscope/report/serving.py"),
        workflow.source_path("src/peftscope/report/templates/report.html.j2"),
        workflow.source_path("src/peftscope/report/templates/report.css"),
        workflow.source_path("src/peftscope/report/templates/report.js"),
    output:
        "reports/{experiment}/report.html",
    log:
        "results/{experiment}/logs/report.log",
    benchmark:
        "results/{experiment}/benchmarks/report.tsv"
    localrule: True
    shell:
        "python -m peftscope page {wildcards.experiment} > {log} 2>&1"


rule check:
    input:
        "results/{experiment}/runs.csv",
        "reports/{experiment}/report.html",
    output:
        touch("results/{experiment}/all-runs-ended-well"),
    log:
        "results/{experiment}/logs/check.log",
    localrule: True
    shell:
        "python -m peftscope check {wildcards.experiment} 2>&1 | tee {log}"
