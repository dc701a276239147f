// Makes the component: `npm run build -- WIT OUTPUT`, where WIT is the folder of WASI's WIT files.
//
// Package preview2-shim is what componentize-js needs without saying so; it fails with a newer one.

import { cpSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";

import { componentize } from "@bytecodealliance/componentize-js";

// The engine answers events by the handler of this version only; what it needs is in all of 0.2.
const VERSION = "0.2.10";

const [from, output] = process.argv.slice(2);
const wit = resolve("wit");
cpSync(from, wit, { recursive: true });
for (const name of readdirSync(wit, { recursive: true }).filter((name) => name.endsWith(".wit"))) {
  const file = join(wit, name);
  writeFileSync(file, readFileSync(file, "utf8").replace(/\b0\.2\.\d+/g, VERSION));
}

const { component } = await componentize({
  sourcePath: resolve("app.js"),
  witPath: wit,
  worldName: "wasi:http/proxy",
});
writeFileSync(output, component);
