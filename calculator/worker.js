// Runs the calculator's Python, so that the page never freezes. Gets the settings of the page as
// {job, settings: [JSON, ...], fits: boolean}; sends {ready} or {failed}, and then for each job {answers: [...]}, {why},
// one {fit} after the other, and {done}. A newer job ends the one before.

import { loadPyodide } from "./pyodide/pyodide.mjs";

const pause = () => new Promise((resolve) => setTimeout(resolve));
let latest = null;
let calculator = null;

onmessage = ({ data }) => {
  latest = data;
  if (calculator) start(data);
};

const start = (job) => reply(job).catch((error) => postMessage({ failed: String(error) }));

async function reply(job) {
  const send = async (message) => {
    postMessage({ job: job.job, ...message });
    await pause(); // lets newer settings in
    return latest === job;
  };
  const answers = job.settings.map((settings) => JSON.parse(calculator.answer(settings)));
  if (!(await send({ answers }))) return;
  if (answers.length > 1 && !answers.some((answer) => answer.problems)) {
    if (!(await send({ why: JSON.parse(calculator.why(...job.settings)) }))) return;
  }
  if (job.fits) {
    const fits = calculator.fits(job.settings[0]);
    for (const fit of fits) if (!(await send({ fit: JSON.parse(fit) }))) return;
  }
  postMessage({ job: job.job, done: true });
}

try {
  const archive = fetch("python.zip").then((response) => response.arrayBuffer());
  const python = await loadPyodide();
  postMessage({ ready: true });
  python.unpackArchive(await archive, "zip", { extractDir: "/lib/python3.14/site-packages" });
  calculator = python.runPython(`
import gc
gc.disable()  # what imports make stays: looking for cycles in it takes time
from peftscope.sizing import page
gc.freeze()
gc.enable()
page
`);
  if (latest) start(latest);
} catch (error) {
  postMessage({ failed: String(error) });
}
