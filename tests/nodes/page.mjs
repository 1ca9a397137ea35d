// Opens workflows in ComfyUI's own page and reports what a person would see; with --run it also runs them there.
// usage: node page.mjs BASE_URL OUT [--run WORKFLOW.json ...] [--open WORKFLOW.json ...]   (beside a node_modules with
// puppeteer-core and @sparticuz/chromium). Writes OUT/NAME.json and OUT/NAME.png of each; those after --open are not run.
import chromium from '@sparticuz/chromium'
import fs from 'fs'
import path from 'path'
import puppeteer from 'puppeteer-core'

const [base, out, ...rest] = process.argv.slice(2)
const opened = rest.includes('--open') ? rest.slice(rest.indexOf('--open') + 1) : []
const files = rest.filter(name => name !== '--run' && name !== '--open')
const minutes = 60000
const pause = ms => new Promise(resolve => setTimeout(resolve, ms))

// In the page: load the graph, and describe it as the page sees it.
async function load(ui, name) {
  await window.app.loadGraphData(ui, true, true, name)
  await new Promise(resolve => setTimeout(resolve, 1500))
  const nodes = window.app.graph._nodes ?? window.app.graph.nodes
  return {
    missing: ui.nodes.map(n => n.type).filter(t => t !== 'MarkdownNote' && !(t in window.LiteGraph.registered_node_types)),
    red: nodes.filter(n => n.has_errors).map(n => n.title),
    api: (await window.app.graphToPrompt()).output,
  }
}

// In the page: close the tour that the first app opens with.
async function skipTour() {
  const skip = [...document.querySelectorAll('button')].find(button => button.textContent.trim() === 'Skip')
  skip?.click()
  await new Promise(resolve => setTimeout(resolve, 1000))
}

// In the page: where nodes and groups are.
function boxes() {
  const graph = window.app.graph
  const box = r => Array.from(r, Math.round)
  return {
    nodes: (graph._nodes ?? graph.nodes).map(n => ({ id: String(n.id), title: n.title, box: box(n.getBounding()) })),
    groups: (graph._groups ?? graph.groups).map(g => ({ title: g.title, box: box(g._bounding ?? g.boundingRect) })),
  }
}

// In the page: queue the graph and wait for its end.
function runGraph(limit) {
  return new Promise((resolve, reject) => {
    const api = window.app.api
    setTimeout(() => resolve({ error: 'not finished in time' }), limit)
    api.addEventListener('execution_success', () => resolve({ ok: true }))
    api.addEventListener('execution_error', e => resolve({ error: e.detail.exception_message, node: e.detail.node_type }))
    window.app.queuePrompt(0, 1).catch(reject)
  })
}

// In the page: the other way in which it draws nodes, "Nodes 2.0".
async function vueNodes(on) {
  await window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)
  await new Promise(resolve => setTimeout(resolve, 4000))
}

// Nothing selected, no dialog open, the whole graph in view; returns where on the page the graph is.
async function tidy(page) {
  await page.keyboard.press('Escape')
  await pause(600)
  await page.evaluate(() => {
    window.app.canvas.deselectAll?.()
    window.app.canvas.canvas.focus()
  })
  await page.keyboard.press('.')
  await pause(6000)
  return page.evaluate(() => {
    const graph = window.app.graph
    const boxes = [...(graph._nodes ?? graph.nodes).map(n => n.getBounding()), ...(graph._groups ?? graph.groups).map(g => g._bounding ?? g.boundingRect)]
    const { scale, offset } = window.app.canvas.ds
    const at = window.app.canvas.canvas.getBoundingClientRect()
    const margin = 16
    const left = at.left + (Math.min(...boxes.map(b => b[0])) + offset[0]) * scale - margin
    const top = at.top + (Math.min(...boxes.map(b => b[1])) + offset[1]) * scale - margin
    const right = at.left + (Math.max(...boxes.map(b => b[0] + b[2])) + offset[0]) * scale + margin
    const bottom = at.top + (Math.max(...boxes.map(b => b[1] + b[3])) + offset[1]) * scale + margin
    return { x: Math.max(left, 0), y: Math.max(top, 0), width: right - left, height: bottom - top }
  })
}

// In the page: true when every picture on a node is there to be drawn.
function pictured() {
  const nodes = window.app.graph._nodes ?? window.app.graph.nodes
  return nodes.every(n => !n.images?.length || (n.imgs?.length && n.imgs.every(i => i.complete && i.naturalWidth > 0)))
}

fs.mkdirSync(out, { recursive: true })
const options = {
  args: [...chromium.args, '--no-sandbox', '--disable-gpu'],
  executablePath: await chromium.executablePath(),
  headless: 'shell',
  defaultViewport: { width: 2000, height: 1125 },
  protocolTimeout: 30 * minutes,
  timeout: 5 * minutes,
}
for (const file of files) {
  // else nodes that are in the server's cache from the workflow before show no picture
  await fetch(base + '/free', { method: 'POST', body: JSON.stringify({ free_memory: true }) })
  const browser = await puppeteer.launch(options) // a new one each time: the page remembers open workflows
  const page = await browser.newPage()
  const errors = []
  page.on('pageerror', error => errors.push(String(error).slice(0, 300)))
  await page.goto(base, { waitUntil: 'domcontentloaded', timeout: 10 * minutes })
  const ready = () => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100
  await page.waitForFunction(ready, { timeout: 10 * minutes })
  await pause(2000)
  await page.evaluate(vueNodes, false) // the server remembers it
  const report = await page.evaluate(load, JSON.parse(fs.readFileSync(file)), path.basename(file, '.json'))
  await page.evaluate(skipTour)
  report.before = await page.evaluate(boxes)
  if (!opened.includes(file)) {
    report.run = await page.evaluate(runGraph, 20 * minutes)
    await pause(3000)
    report.after = await page.evaluate(boxes)
  }
  const app = JSON.parse(fs.readFileSync(file)).extra?.linearMode
  if (app) await page.evaluate(skipTour)
  const clip = app ? undefined : await tidy(page)
  const late = () => errors.push('a picture did not appear')
  if (!app) await page.waitForFunction(pictured, { timeout: minutes }).catch(late)
  const name = path.basename(file, '.json')
  await page.screenshot({ path: path.join(out, name + '.png'), clip })
  if (!app) report.vue = await page.evaluate(vueNodes, true).then(() => page.evaluate(boxes))
  fs.writeFileSync(path.join(out, name + '.json'), JSON.stringify({ ...report, errors }))
  console.log(name)
  await browser.close()
}
