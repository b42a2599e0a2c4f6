// Package conntrack reads flows from the kernel's connection tracking table (ctnetlink).
//
// It only ever asks for what it needs: one flow by its tuple (6 us), or those whose replies come
// from one port, filtered by the kernel (CTA_FILTER, Linux 5.8; it still walks all
// buckets: 11 ms on a large machine). It changes no flow, but deletes those it is told to. It needs CAP_NET_ADMIN.
package conntrack
