"""What type checkers must refuse: every line that ends in the marker, and no other. It is read, and never run."""

# ruff: noqa: B007, B015, B018

import fieldlab as fl


@fl.task
def resolve(name: str) -> list[str]:
    return [name]


@fl.task
def count(*, ctx: fl.TaskContext) -> int:
    return ctx.atempt  # refused


@fl.task(timeout=[30])  # refused
def timed() -> None: ...


@fl.task(package=["numpy"])  # refused
def packed() -> None: ...


@resolve.implementation()  # refused
def without_condition(name: str) -> list[str]:
    return [name]


@resolve.implementation(when="linux")  # refused
def with_text(name: str) -> list[str]:
    return [name]


@resolve.implementation(when=fl.node.os == "linux")  # refused
def with_other_parameters(name: int) -> list[str]:
    return []


@resolve.implementation(when=fl.node.os == "linux")  # refused
def with_another_result(name: str) -> int:
    return 0


step = resolve("example.org")
resolve.fn(5)  # refused
resolve.fn(name="x", more=1)  # refused
names: list[str] = resolve("example.org")  # refused
step.valu  # refused
step.value  # refused
step + "x"  # refused
step < 5  # refused
len(step)  # refused
"x" in step  # refused
for one in step:  # refused
    pass
step.after(step, on="sucess")  # refused
step.after(step, need="some")  # refused
step.named(5)  # refused
step.when(step, "x > 1")  # refused
step.exclusive(1)  # refused

fl.background(resolve)  # refused
fl.background(step, stop="SIGINT")  # refused
fl.repeat(resolve, times=2)  # refused
fl.repeat(step, times="2")  # refused
fl.repeat(step, times=2, on_failure="ignore")  # refused
fl.map(len, step)  # refused
fl.wait_for("go", timeout=[1])  # refused
fl.barrier("start", parties=1.5)  # refused
fl.shell(5)  # refused
fl.shell("ls", ok_codes="0")  # refused
fl.DAG("x", max_parallel="2")  # refused
fl.DAG("x", isolation="threads")  # refused
fl.Pipeline("x").then(resolve)  # refused
fl.node.os & fl.node.cpus  # refused
(fl.node.os == "linux") & True  # refused
fl.node["kernel"].version > 6.1  # refused
fl.node["ipv4"].address > "10.0.0.1"  # refused
fl.node["ipv4"].address.within(10)  # refused
fl.Resources(cpus="one")  # refused
fl.Node.dummy(5)  # refused

dag = fl.DAG("x")
client = fl.Client()
nodes = client.nodes()
experiment = fl.Experiment("x", reporting="loud")  # refused
experiment.map("dag", nodes)  # refused
experiment.map(dag, nodes, env="host")  # refused
experiment.map(dag, nodes, rôle="x")  # refused
nodes.where("linux")  # refused
nodes.take("3")  # refused
nodes[1.5]  # refused
fl.plan("dag")  # refused
fl.run(step)  # refused
fl.run(dag).results  # refused
fl.run(dag)[0]  # refused
fl.run(experiment)["pi-2"]  # refused
fl.run(experiment, node=nodes[0])  # refused

run = client.submit(experiment)
client.submit(dag)  # refused
client.submit(experiment, if_exists="replace")  # refused
client.run()  # refused
client.infrastructures.attach("lab", "local")  # refused
run.wait(timeout="1h")  # refused
run.cancel(because="x")  # refused
run.results[0]  # refused
run.results["pi-2"][0]  # refused
run.results["pi-2"]["x"].valeu  # refused
run.logs(follow="yes")  # refused
run.logs(since=[5])  # refused
run.cancel(nodes=5)  # refused
run.timeline().of(3)  # refused
run.events.send(5)  # refused
run.events.wait("x", count="3")  # refused
run.events.wait("x", where="loss")  # refused
run.artifacts.download(5)  # refused
