// Look at the built site with a real browser: console errors, requests to other hosts, sideways scrolling, axe-core's
// accessibility rules; on a desk, on a phone, light and dark.  Optional: it needs Node and Chromium, and make test
// does not run it.
//
//   npm install --no-save --prefix _build/browser playwright-core axe-core
//   node book/_tools/browser.mjs [--shots FOLDER] [page.html ...]
//
// Chromium is looked for at CHROMIUM, else /usr/bin/chromium.

import { createServer } from "node:http";
import { mkdirSync, readdirSync, readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, extname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = resolve(dirname(fileURLToPath(import.meta.url)), "..", "..");
const SITE = join(ROOT, "_build", "html");
const require = createRequire(join(process.env.NODE_MODULES ?? join(ROOT, "_build", "browser"), "package.json"));
const { chromium } = require("playwright-core");
const AXE = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const TYPES = {
  ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".png": "image/png",
  ".woff": "font/woff", ".woff2": "font/woff2", ".json": "application/json", ".ipynb": "application/json",
};
const SCREENS = {
  desk: { viewport: { width: 1366, height: 900 }, colorScheme: "light" },
  dark: { viewport: { width: 1366, height: 900 }, colorScheme: "dark" },
  phone: { viewport: { width: 390, height: 844 }, colorScheme: "light", isMobile: true, deviceScaleFactor: 2 },
};

function pages(folder, prefix = "") {
  return readdirSync(join(folder, prefix)).flatMap((name) => {
    const path = prefix ? `${prefix}/${name}` : name;
    if (statSync(join(folder, path)).isDirectory()) return name.startsWith("_") ? [] : pages(folder, path);
    return name.endsWith(".html") && name !== "index.html" ? [path] : [];
  });
}

const options = process.argv.slice(2);
const at = options.indexOf("--shots");
const shots = at < 0 ? "" : options.splice(at, 2)[1];
if (shots) mkdirSync(shots, { recursive: true });
const wanted = options.length ? options : pages(SITE);

const server = createServer((request, response) => {
  const path = join(SITE, decodeURIComponent(new URL(request.url, "http://x").pathname));
  try {
    response.setHeader("Content-Type", TYPES[extname(path)] ?? "application/octet-stream");
    response.end(readFileSync(path));
  } catch {
    response.statusCode = 404;
    response.end();
  }
}).listen(0, "127.0.0.1");
await new Promise((done) => server.once("listening", done));
const home = `http://127.0.0.1:${server.address().port}/`;

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
let problems = 0;
for (const [screen, settings] of Object.entries(SCREENS)) {
  for (const name of wanted) {
    const context = await browser.newContext(settings);
    const page = await context.newPage();
    const found = [];
    page.on("console", (message) => {
      const missing = message.text().startsWith("Failed to load resource"); // reported with its address below
      if (message.type() === "error" && !missing) found.push(`console: ${message.text()}`);
    });
    page.on("response", (response) => response.status() >= 400 && found.push(`misses ${response.url()}`));
    page.on("pageerror", (error) => found.push(`error: ${error.message}`));
    page.on("request", (request) => {
      if (!request.url().startsWith(home) && !request.url().startsWith("data:")) found.push(`loads ${request.url()}`);
    });
    await page.goto(home + name, { waitUntil: "networkidle" });
    await page.waitForFunction(() => !window.MathJax?.startup || window.MathJax.startup.promise.then(() => true));
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    if (wide > 1) found.push(`is ${wide} pixels wider than the screen`);
    await page.addScriptTag({ content: AXE });
    const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    for (const { id, impact, nodes } of violations)
      found.push(`axe ${id} (${impact}), ${nodes.length} times, e.g. ${nodes[0].html.slice(0, 160)}`);
    if (shots) {
      const file = join(shots, `${name.replace(/\.html$/, "").replaceAll("/", "-")}-${screen}.png`);
      await page.screenshot({ path: file, fullPage: true });
    }
    if (found.length) console.log(`${name} (${screen})\n  ${found.join("\n  ")}`);
    problems += found.length;
    await context.close();
  }
}
await browser.close();
server.close();
console.log(problems ? `${problems} problems` : `${wanted.length} pages on ${Object.keys(SCREENS).length} screens: nothing wrong`);
process.exit(problems ? 1 : 0);
