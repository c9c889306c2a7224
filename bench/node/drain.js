'use strict';

// One worker process empties a queue of stored no-op jobs, under the rules of bench/contestants/drain.py.

const Queue = require('bee-queue');
const {order, redis, report} = require('./order');

const queue = new Queue(order.queue, {
  redis,
  isWorker: true,
  getEvents: false,
  sendEvents: true,
  storeJobs: false,
  removeOnSuccess: true,
});
let started = 0;
let succeeded = 0;

queue.on('succeeded', () => {
  succeeded += 1;
  if (succeeded === order.jobs) {
    report(order.jobs, (performance.now() - started) / 1000);
    queue.close();
  }
});

async function handler() {
  if (!started) started = performance.now();
}

queue.ready().then(() => queue.process(order.concurrency, handler));
