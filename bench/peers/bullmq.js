'use strict';

// bullmq on Node: addBulk saves a thousand jobs at a time, and jobs are removed when they complete, as its documentation
// advises for speed. The clock follows bench/contestants/drain.py: `completed` comes when Redis has confirmed the finish.

const {Queue, Worker} = require('bullmq');
const {version} = require('bullmq/package.json');

const order = JSON.parse(process.argv[2]);
const {protocol, pathname, hostname, port} = new URL(order.url);
const connection = {
  ...(protocol === 'unix:' ? {path: pathname} : {host: hostname, port: Number(port)}),
  maxRetriesPerRequest: null,
};
const BATCH = 1_000;

function report(started) {
  console.log(JSON.stringify({version, jobs: order.jobs, seconds: (performance.now() - started) / 1000}));
  process.exit();
}

async function enqueue() {
  const queue = new Queue(order.queue, {connection, defaultJobOptions: {removeOnComplete: true}});
  await queue.waitUntilReady();
  const started = performance.now();
  for (let first = 0; first < order.jobs; first += BATCH) {
    const size = Math.min(BATCH, order.jobs - first);
    await queue.addBulk(Array.from({length: size}, (_, n) => ({name: 'noop', data: {n: first + n}})));
  }
  report(started);
}

function drain() {
  let started = 0;
  let completed = 0;
  const worker = new Worker(order.queue, async () => {
    if (!started) started = performance.now();
  }, {connection, concurrency: order.concurrency});
  worker.on('completed', () => {
    completed += 1;
    if (completed === order.jobs) report(started);
  });
}

({enqueue, drain})[order.step]();
