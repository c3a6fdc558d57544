// What the scenarios share: who comes, and a connection that answers with promises.
//
// URL is the server, TOKENS a file of access tokens, one a line.

import exec from "k6/execution";
import { SharedArray } from "k6/data";
import { Rate, Trend } from "k6/metrics";
import { WebSocket } from "k6/experimental/websockets";

export const url = __ENV.URL || "http://127.0.0.1:8000";
const file = __ENV.TOKENS || "tokens.txt";
const tokens = new SharedArray("tokens", () => open(file).trim().split("\n"));

// The users take the tokens in turn.
export const token = () => tokens[exec.vu.idInTest % tokens.length];

// From a request to its answer, in milliseconds, by package.
export const latency = new Trend("switchboard_latency", true);
// Requests that were refused, or had no answer.
export const failed = new Rate("switchboard_failed");
// From the first packet to auth_ok, in milliseconds.
export const connecting = new Trend("switchboard_connecting", true);

// How many users, for how long, and what makes a run fail.
export const options = {
  vus: Number(__ENV.VUS || 10),
  duration: __ENV.DURATION || "30s",
  thresholds: { switchboard_failed: ["rate==0"], switchboard_latency: ["p(99)<500"] },
};

const hex = (digits) => Math.floor(Math.random() * 16 ** digits).toString(16).padStart(digits, "0");

// A random UUID of version 4.
export const uuid = () => `${hex(8)}-${hex(4)}-4${hex(3)}-8${hex(3)}-${hex(12)}`;

export class Connection {
  // Calls `session` once it is authenticated, and closes when that has returned.
  static run(session) {
    return new Promise((resolve) => {
      const connection = new Connection();
      const socket = new WebSocket(url.replace("http", "ws") + "/web");
      const started = Date.now();
      connection.socket = socket;
      connection.waiting = {};
      socket.onopen = () => socket.send(JSON.stringify({ type: "auth", token: `Bearer ${token()}` }));
      socket.onmessage = async ({ data }) => {
        const frame = JSON.parse(data);
        if (frame.type === "auth_ok") {
          connecting.add(Date.now() - started);
          await session(connection);
          socket.close(1000);
        } else if (frame.type === "error") {
          console.error(`not authenticated: ${frame.code}`);
          failed.add(true);
        } else if (connection.waiting[frame.req_id]) {
          connection.waiting[frame.req_id](frame);
        }
      };
      socket.onerror = ({ error }) => {
        console.error(error);
        failed.add(true);
      };
      socket.onclose = () => {
        for (const answer of Object.values(connection.waiting)) answer({ status_code: 1 });
        resolve();
      };
    });
  }

  // The answer to a request.
  async request(pkg_id, data) {
    const req_id = uuid();
    const started = Date.now();
    const answer = await new Promise((resolve) => {
      this.waiting[req_id] = resolve;
      this.socket.send(JSON.stringify({ pkg_id, req_id, data }));
    });
    delete this.waiting[req_id];
    latency.add(Date.now() - started, { pkg_id: String(pkg_id) });
    failed.add(answer.status_code !== 0);
    return answer;
  }
}
