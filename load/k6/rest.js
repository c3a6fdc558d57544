// Authors over REST: nine pages are read for each one that is made.
//
//   k6 run -e URL=http://127.0.0.1:8000 -e TOKENS=$PWD/tokens.txt load/k6/rest.js

import http from "k6/http";
import { check } from "k6";
import { token, url, uuid } from "./switchboard.js";

import { options as shared } from "./switchboard.js";

export const options = { ...shared, thresholds: { http_req_failed: ["rate==0"], http_req_duration: ["p(99)<500"] } };

export default () => {
  const headers = { Authorization: `Bearer ${token()}`, "Content-Type": "application/json" };
  const name = `k6 ${uuid()}`;
  const made = http.post(`${url}/authors`, JSON.stringify({ name }), { headers });
  check(made, { "an author is made": (made) => made.status === 201 && made.json("name") === name });
  for (let page = 1; page < 10; page++) {
    const read = http.get(`${url}/authors/paginated?page=${page}`, { headers, tags: { name: "page" } });
    check(read, { "a page is read": (read) => read.status === 200 });
  }
};
