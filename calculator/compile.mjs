// Compiles the Python modules that an answer imports. A browser would compile them at every visit, in half of the time
// until the first answer. All other modules stay as they are, so that none is missing.
//
// node compile.mjs PYODIDE ARCHIVE PAGE

import { readFileSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [pyodide, archive, page] = process.argv.slice(2).map((path) => resolve(path));
const { loadPyodide } = await import(pathToFileURL(join(pyodide, "pyodide.mjs")));
const python = await loadPyodide();
const bytes = (path) => new Uint8Array(readFileSync(path));
python.FS.writeFile("/library.zip", bytes(join(pyodide, "python_stdlib.zip")));
python.FS.writeFile("/python.zip", bytes(archive));
python.runPython(`
import importlib.util, json, sys, zipfile
from importlib._bootstrap_external import _code_to_hash_pyc

packages = "/lib/python3.14/site-packages"
zipfile.ZipFile("/python.zip").extractall(packages)
from peftscope.sizing import page
setting = json.dumps({"model": "llama-2-7b", "gpu": "rtx4090"})
page.answer(setting), page.why(setting, json.dumps({"model": "llama-2-7b", "method": "qlora"})), next(page.fits(setting))
library = next(path for path in sys.path if path.endswith(".zip"))
used = {spec.origin for module in list(sys.modules.values()) if (spec := getattr(module, "__spec__", None))}

for archive, root in (("/library.zip", library), ("/python.zip", packages)):
    with zipfile.ZipFile(archive) as before, zipfile.ZipFile("/out" + archive.replace("/", "-"), "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name.endswith(".py") and f"{root}/{name}" in used:
                code = compile(content, name, "exec", dont_inherit=True)
                name, content = name + "c", _code_to_hash_pyc(code, importlib.util.source_hash(content), False)
            after.writestr(name, content, zipfile.ZIP_DEFLATED, 9)
`);
writeFileSync(join(page, "pyodide", "python_stdlib.zip"), python.FS.readFile("/out-library.zip"));
writeFileSync(join(page, "python.zip"), python.FS.readFile("/out-python.zip"));
